"""The arithmetic of conflict and recovery, on scores made by hand and against slow definitions."""

import numpy as np
import pytest

from mllm.evaluation.intervals import RESAMPLES
from mllm.evaluation.significance import bootstrap_p, holm
from studies.conflict.analysis import Measured, Scores, analyse, hurts, measure, recovered, weighted_means


def scores(**right: list[list[int]]) -> Scores:
    """Two domains, a picture a sample."""
    arrays = {arm: np.array(rows, dtype=bool) for arm, rows in right.items()}
    size = next(iter(arrays.values())).shape[1]
    domain_N = np.array(["a"] * (size // 2) + ["b"] * (size // 2))
    return Scores(arrays, domain_N, domain_N, np.arange(size))


def test_weighted_means_are_those_of_data_sets_written_out_row_by_row():
    rng = np.random.default_rng(0)
    right_ASN = rng.random((2, 3, 9)) < 0.5
    cluster_N = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3])
    drawn_MC = rng.multinomial(4, np.full(4, 0.25), size=6)
    drawn_MS = rng.multinomial(3, np.full(3, 1 / 3), size=6)
    fast_AM = weighted_means(right_ASN.astype(float), cluster_N, drawn_MC, drawn_MS)
    for a in range(2):
        for m in range(6):
            seeds = [s for s in range(3) for _ in range(drawn_MS[m, s])]
            pictures = [c for c in range(4) for _ in range(drawn_MC[m, c])]
            written_out = [right_ASN[a, s, n] for s in seeds for c in pictures for n in np.flatnonzero(cluster_N == c)]
            assert fast_AM[a, m] == pytest.approx(np.mean(written_out))


def test_resamples_scatter_as_a_slow_bootstrap_of_seeds_and_pictures_does():
    rng = np.random.default_rng(1)
    skill_SC = 0.3 * rng.random((4, 1)) + 0.5 * rng.random((1, 20))
    right_SN = rng.random((4, 40)) < np.repeat(skill_SC, 2, axis=1)
    data = Scores({"x": right_SN}, np.full(40, "a"), np.full(40, "a"), np.arange(40) // 2)
    fast_M = measure(data, "domains")["x"]["a"].drawn_M
    slow = []
    for _ in range(3000):
        seeds, pictures = rng.integers(4, size=4), rng.integers(20, size=20)
        slow.append(right_SN.reshape(4, 20, 2)[seeds][:, pictures].mean())
    assert len(fast_M) == RESAMPLES
    assert np.std(fast_M) == pytest.approx(np.std(slow), rel=0.06)
    assert np.mean(fast_M) == pytest.approx(np.mean(slow), abs=0.01)


def test_conflict_is_single_minus_mix_and_recovery_the_share_of_it_that_an_arm_gets_back():
    many = 40
    found = analyse(
        scores(
            single=[[1] * 2 * many] * 2,
            mix=[[1, 0] * many] * 2,
            mole=[[1, 0] * (many // 2) + [1, 1] * (many // 2)] * 2,
        ),
        baseline="mix",
    )
    assert found["conflict"]["mean"]["difference"] == pytest.approx(0.5)
    assert found["conflict"]["domains"]["a"]["difference"] == pytest.approx(0.5)
    assert found["hurts"] == {"domains": {"a": True, "b": True}, "mean": True}
    assert found["recovery"]["mole"]["domains"]["a"]["recovery"] == pytest.approx(0.0)
    assert found["recovery"]["mole"]["domains"]["b"]["recovery"] == pytest.approx(1.0)
    mean = found["recovery"]["mole"]["mean"]
    assert mean["recovery"] == pytest.approx(0.5)
    assert mean["ci_low"] < 0.5 < mean["ci_high"]
    assert set(found["differences"]["mix"]) == {"mole"}  # single is not one of the arms that are tested


def test_where_mixing_does_not_hurt_there_is_no_recovery():
    same = [[1, 0] * 20] * 2
    found = analyse(scores(single=same, mix=same, mole=[[1] * 40] * 2), baseline="mix")
    assert found["hurts"] == {"domains": {"a": False, "b": False}, "mean": False}
    assert found["recovery"]["mole"] == {"domains": {"a": None, "b": None}, "mean": None}
    assert found["differences"]["mix"]["mole"]["mean"]["difference"] == pytest.approx(0.5)


def test_the_interval_of_recovery_is_that_of_the_ratio_of_the_same_resamples():
    rng = np.random.default_rng(0)
    conflict_M = 0.2 + 0.05 * rng.standard_normal(RESAMPLES)
    gain = Measured(np.full(2, 0.1), 0.5 * conflict_M)  # half of the conflict in every resample
    recovery = recovered(gain, Measured(np.full(2, 0.2), conflict_M))
    assert [recovery["recovery"], recovery["ci_low"], recovery["ci_high"]] == pytest.approx([0.5, 0.5, 0.5])
    assert not hurts(Measured(np.full(2, 0.05), conflict_M - 0.15))


def test_the_same_seeds_and_pictures_are_drawn_for_all_arms():
    rng = np.random.default_rng(0)
    right = rng.random((3, 30)) < 0.5
    found = analyse(scores(mix=right, copy=right), baseline="mix")
    told = found["differences"]["mix"]["copy"]["mean"]
    assert (told["difference"], told["ci_low"], told["ci_high"]) == (0, 0, 0)


def test_p_values_are_adjusted_over_the_arms_that_are_compared_with_one_other():
    rng = np.random.default_rng(3)
    data = scores(**{name: rng.random((3, 60)) < share for name, share in {"mix": 0.3, "x": 0.55, "y": 0.4}.items()})
    by_domain = measure(data, "domains")
    raw = [
        bootstrap_p(np.mean([by_domain[arm][d].drawn_M - by_domain["mix"][d].drawn_M for d in "ab"], axis=0))
        for arm in ("x", "y")
    ]
    told = analyse(data, baseline="mix")["differences"]["mix"]
    assert [told[arm]["mean"]["p_holm"] for arm in ("x", "y")] == pytest.approx(holm(raw), rel=0.1)
    assert told["y"]["mean"]["p_holm"] == told["y"]["mean"]["p"] > 0.01
    assert told["x"]["mean"]["t"]["n"] == 3


def test_one_seed_has_an_interval_over_pictures_and_no_t():
    found = analyse(scores(single=[[1] * 40], mix=[[1, 0] * 20], mole=[[1, 1, 0, 0] * 10]), baseline="mix")
    assert found["hurts"]["mean"]
    assert np.isnan(found["conflict"]["mean"]["t"]["p"])
