"""The study's arithmetic on cases worked out by hand, and that it goes on where it stopped."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from mllm.data.sources import Source
from mllm.mole import MoleConfig
from studies.adamoe.adapters import FRAME, measure
from studies.adamoe.analysis import correlation, estimate, experts_over_layers, holm, loss_at_load
from studies.adamoe.native import ARMS, NativeStudy, prose
from studies.adamoe.report import read_part, write_report
from studies.adamoe.runs import Arm, Measured, Tokens, run_part
from studies.finetune import Schedule, cache, finetune, score_answers
from studies.runner import RunFolder
from tests.tiny import tiny_image, tiny_llava
from train.config import OptimSection

NULL_GAIN = 0.3
QUIET = Console(quiet=True)


class ToyStudy:
    """Loss is 2 - load / 2, less a gain for null experts; harder tokens take more of them."""

    part = "a"
    arms = (
        Arm("top2", "top-2", {"load": 2.0}),
        Arm("drop15", "dropping", {"load": 1.5}),
        Arm("drop50", "dropping", {"load": 1.0}),
        Arm("null_m7", "null", {"load": 1.75}),
    )

    def __init__(self, steps=1):
        self.steps, self.is_prepared = steps, False

    def recipe(self, arm, seed):
        return {"steps": self.steps}

    def prepare(self):
        self.is_prepared = True

    def run(self, arm, seed):
        assert self.is_prepared
        rng, is_null = np.random.default_rng(seed), arm.family == "null"
        loss_N = rng.random(200)
        real_picks_NL = (loss_N[:, None] > [0.3, 0.6] if is_null else rng.random((200, 2)) > 0.5).astype(np.int8)
        tokens = Tokens(loss_N, real_picks_NL, np.arange(200) % 4, rng.random(200))
        loss = 2 - arm.settings["load"] / 2 + seed - (NULL_GAIN + 0.01 * seed) * is_null
        figures = {"load": arm.settings["load"], "loss": loss, "right": 0.5, "variance": 0.2, "none": 0.1}
        return Measured(figures, tokens)


def test_loss_at_load_lies_on_the_line_between_two_loads_and_is_not_guessed_beyond_them():
    assert loss_at_load([2.0, 1.0], [1.0, 3.0], 1.25) == pytest.approx(2.5)
    assert np.isnan(loss_at_load([2.0, 1.0], [1.0, 3.0], 2.1))


def test_an_estimate_is_the_t_interval_of_the_seeds_that_can_be_compared():
    value = estimate([1.0, 2.0, 3.0, np.nan])
    half = 4.302652730 / np.sqrt(3)  # t of 0.975 with two degrees of freedom, from a table
    assert value.n == 3
    assert (value.low, value.high) == pytest.approx((2 - half, 2 + half))
    assert value.detectable == pytest.approx((4.302652730 + 1.060660172) / np.sqrt(3))


def test_holm_multiplies_the_smallest_p_most_and_never_falls():
    adjusted = holm({"a": 0.03, "b": 0.01, "c": 0.02, "d": np.nan})
    assert (adjusted["b"], adjusted["c"], adjusted["a"]) == pytest.approx((0.03, 0.04, 0.04))
    assert np.isnan(adjusted["d"])


def test_a_correlation_that_position_alone_makes_is_removed():
    position_N, rng = np.repeat([0, 1], 500), np.random.default_rng(0)
    first_N, second_N = (10 * position_N + rng.random(1000) for _ in range(2))
    assert np.corrcoef(first_N, second_N)[0, 1] > 0.99
    assert abs(correlation(first_N, second_N, position_N)) < 0.1
    assert correlation(first_N, first_N - 50 * position_N, position_N) == pytest.approx(1.0)


def test_positions_that_never_vary_do_not_dilute_a_correlation():
    values_N, position_N = np.array([5.0] * 50 + list(range(50))), np.repeat([0, 1], 50)
    others_N = np.concatenate([np.random.default_rng(0).random(50), np.arange(50.0)])
    assert correlation(values_N, others_N, position_N) == pytest.approx(1.0)
    assert np.isnan(correlation(np.ones(100), others_N, position_N))


def test_a_layer_that_always_takes_more_does_not_count_for_a_token():
    assert experts_over_layers(np.array([[2, 0], [2, 1], [2, 2]])).tolist() == [-1, 0, 1]


def test_a_stopped_study_goes_on_and_runs_anew_what_another_recipe_made(tmp_path):
    study, runs = ToyStudy(), RunFolder(tmp_path)
    assert run_part(study, runs, 2, QUIET) == 8
    (tmp_path / "a-drop15-s1.json").unlink()
    assert run_part(study, runs, 2, QUIET) == 1
    assert run_part(ToyStudy(steps=2), runs, 2, QUIET) == 8
    assert run_part(ToyStudy(steps=3), runs, 2, QUIET, limit_minutes=0) == 0


def test_the_report_finds_the_gain_at_equal_load_and_the_tokens_that_took_more(tmp_path):
    study, runs = ToyStudy(), RunFolder(tmp_path / "runs")
    run_part(study, runs, 3, QUIET)
    result = read_part(study, runs, 5)
    assert result.seeds == [0, 1, 2]
    assert result.families["null"].mean == pytest.approx(-NULL_GAIN - 0.01)
    assert result.holm["null"] < 0.05
    follows = {each.arm.name: each.follows_loss.mean for each in result.arms}
    assert follows["null_m7"] > 0.8 > 0.3 > abs(follows["drop15"])
    write_report([result], tmp_path, QUIET)
    assert "**null** against random dropping at equal load: better" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["parts"]["a"]["arms"]["top2"]["distance"]["mean"] is None
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_a_seed_with_an_arm_missing_is_not_reported(tmp_path):
    study, runs = ToyStudy(), RunFolder(tmp_path)
    run_part(study, runs, 1, QUIET)
    (tmp_path / "a-null_m7-s0.json").unlink()
    assert read_part(study, runs, 1) is None


def test_no_paragraph_is_both_trained_on_and_tested_on():
    train, test = (text.split("\n\n") for text in prose().values())
    assert not set(train) & set(test)
    assert 0.1 < len("".join(test)) / len("".join(train)) < 0.4


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    work = tmp_path_factory.mktemp("native")
    return NativeStudy(work, width=16, expert_width=8, layers=2, experts=8, sequence=64, first_steps=2, arm_steps=2)


@pytest.mark.parametrize("name", ["top1", "drop65", "null_m9", "identity_m6", "frozen_m9"])
def test_every_kind_of_native_arm_is_trained_and_measured(native, name):
    arm = next(arm for arm in ARMS if arm.name == name)
    measured = native.run(arm, seed=0)
    tokens = measured.tokens
    assert measured.figures["load"] == pytest.approx(tokens.real_picks_NL.mean(), abs=1e-4)
    assert tokens.loss_N.mean(dtype=np.float64) < np.log(2048) + 0.1
    assert len(tokens.loss_N) == len(tokens.position_N) == len(tokens.log_frequency_N) == len(tokens.real_picks_NL)
    if name == "drop65":
        assert measured.figures["load"] == pytest.approx(0.7, abs=0.02)


def test_arms_of_a_seed_start_from_one_model(native):
    first, second = native.first_model(1), native.first_model(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = native.first_model(2).state_dict()
    assert not torch.equal(first.state_dict()["lm_head.weight"], other["lm_head.weight"])


def test_answers_are_scored_as_fine_tuning_scores_them_and_routed_token_by_token(tmp_path):
    tiny_image("red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    bare = [{"from": "human", "value": "How many cells are there?"}, {"from": "gpt", "value": "three of them"}]
    records = [{"id": "0", "image": "red.png", "conversations": turns}, {"id": "1", "conversations": bare}]
    (tmp_path / "rows.json").write_text(json.dumps(records))
    base, processor = tiny_llava()
    data = cache(base, processor, list(Source(tmp_path / "rows.json")))
    arm = Arm("null", "null", {"top_k": 3, "num_null_experts": 2})
    schedule = Schedule(steps=2, batch_size=2, optim=OptimSection(lr=1e-2))
    model = finetune(base, MoleConfig(**FRAME | arm.settings), data, schedule)
    measured, scores = measure(model, data, np.arange(10.0), batch_size=2), score_answers(model, data)
    starts = np.flatnonzero(measured.tokens.position_N == 0)
    means = [part.mean() for part in np.split(measured.tokens.loss_N, starts[1:])]
    assert means == pytest.approx(scores.loss.tolist())
    alone = measure(model, data, np.arange(10.0), batch_size=1)
    assert (alone.tokens.real_picks_NL == measured.tokens.real_picks_NL).all()
    assert alone.figures["load"] == pytest.approx(measured.figures["load"])
    assert 0 < measured.figures["load"] < 3
