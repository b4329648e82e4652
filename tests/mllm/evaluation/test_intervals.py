"""Bootstrap means and intervals against closed forms and against drawing rows one by one."""

import numpy as np
import pytest

from mllm.evaluation import intervals
from mllm.evaluation.intervals import RESAMPLES, bootstrap_means, interval


def means_of(scores, clusters=None, seed=0):
    clusters = clusters or [str(row) for row in range(len(scores))]
    return bootstrap_means(scores, clusters, rng=np.random.default_rng(seed))


def slow_means(scores, clusters, rng):
    """The definition: pictures drawn with replacement, all their rows pooled."""
    rows_of = [[s for s, c in zip(scores, clusters, strict=True) if c == each] for each in sorted(set(clusters))]
    for _ in range(RESAMPLES):
        pooled = [score for index in rng.integers(len(rows_of), size=len(rows_of)) for score in rows_of[index]]
        yield sum(pooled) / len(pooled)


def test_the_interval_of_right_and_wrong_answers_is_the_binomial_one():
    low, high = interval(means_of([1.0] * 80 + [0.0] * 20))
    spread = 1.96 * np.sqrt(0.8 * 0.2 / 100)
    assert low == pytest.approx(0.8 - spread, abs=0.011)  # means are multiples of 0.01
    assert high == pytest.approx(0.8 + spread, abs=0.011)


def test_resamples_are_distributed_as_pictures_drawn_one_by_one():
    scores = [1.0, 0.0, 0.6, 1.0, 0.0, 0.3, 1.0, 0.0, 0.0, 0.9]
    clusters = list("aabbbcdeef")
    fast = means_of(scores, clusters)
    slow = np.array(list(slow_means(scores, clusters, np.random.default_rng(1))))
    levels = [2.5, 25, 50, 75, 97.5]
    # worst difference over 20 seeds: 0.020; the distribution is discrete, with steps of about 0.01
    assert np.percentile(fast, levels) == pytest.approx(np.percentile(slow, levels), abs=0.03)


def test_questions_on_one_picture_widen_the_interval():
    scores = [1.0] * 50 + [0.0] * 50
    apart = interval(means_of(scores))
    together = interval(means_of(scores, [str(row // 10) for row in range(100)]))
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_a_single_row_has_an_interval_of_no_width():
    assert interval(means_of([1.0])) == (1.0, 1.0)


def test_the_same_seed_gives_the_same_resamples_and_another_seed_others():
    scores = [1.0, 0.0, 0.5, 1.0, 0.2]
    assert np.array_equal(means_of(scores), means_of(scores))
    assert not np.array_equal(means_of(scores), means_of(scores, seed=1))


def test_memory_is_bounded_by_drawing_in_chunks(monkeypatch):
    monkeypatch.setattr(intervals, "_CELLS_AT_ONCE", 3000)
    means = means_of(np.linspace(0, 1, 7).tolist())
    assert means.shape == (RESAMPLES,)
    assert means.mean() == pytest.approx(0.5, abs=0.01)
