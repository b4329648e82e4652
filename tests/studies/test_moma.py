"""The study's arithmetic on curves whose answer is known, and a smoke run of three arms."""

from dataclasses import replace

import pytest
from rich.console import Console

from mllm.moma import MomaForCausalLM
from studies.moma import arms as all_arms
from studies.moma.analysis import analyse, as_markdown, contrasts, eta, interval
from studies.moma.arms import ARMS, SCALES, arm_config
from studies.moma.picture import draw
from studies.moma.runs import Run, Study, SweepThenSeeds, run_study
from studies.moma.speed import as_table, measure
from tests.train.moma_data import write_image_tokenizer

QUIET = Console(quiet=True)


def curve(losses, step=100.0):
    return [{"flops": step * 2**k, "losses": {"all": loss}} for k, loss in enumerate(losses)]


def test_an_arm_that_is_always_one_doubling_ahead_has_eta_two():
    dense, arm = curve([4.0, 3.0, 2.0, 1.0]), curve([3.0, 2.0, 1.0, 0.5])
    assert eta(arm, dense) == pytest.approx(2)
    assert eta(dense, arm) == pytest.approx(0.5)


def test_an_arm_like_dense_has_eta_one_and_noise_upwards_does_not_matter():
    assert eta(curve([3, 2, 1]), curve([3, 2, 1])) == pytest.approx(1)
    assert eta(curve([3, 2, 2.5, 1]), curve([3, 2, 2, 1])) == pytest.approx(1)


def test_interval_of_equal_values_has_no_width_and_of_others_is_students():
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0 - 4.3027 / 3**0.5, 2.0 + 4.3027 / 3**0.5), rel=1e-4)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = Study("smoke", write_image_tokenizer(folder / "tokenizer"), folder)
    study.data.cache = folder / "rows"
    study.prepare()
    return study


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_model_and_none_has_more_experts_a_token_than_one(study, arm):
    model = MomaForCausalLM(arm_config(arm, SCALES["smoke"], study.processor))
    assert model.config.num_experts_per_tok == 1


def test_the_dense_arm_of_equal_total_size_has_the_weights_of_4t4i(study):
    sizes = {
        arm: sum(p.numel() for p in MomaForCausalLM(arm_config(arm, SCALES["cpu"], study.processor)).parameters())
        for arm in ("dense_total", "4t4i")
    }
    assert sizes["dense_total"] == pytest.approx(sizes["4t4i"], rel=0.01)


def test_a_smoke_run_gives_eta_gaps_and_causal_losses_and_is_not_made_twice(study, monkeypatch):
    arms = ["dense", "4t4i", "token_split"]
    plan = SweepThenSeeds(study, arms, 2, 2)
    assert run_study(plan, QUIET) == plan.size
    assert run_study(plan, QUIET) == 0
    results = analyse(study, arms, 2)
    assert results["dense"]["eta"]["flops"]["all"] == pytest.approx([1, 1, 1])
    assert results["4t4i"]["seeds"] == [0, 1]
    assert {"threshold", "aux", "batch_leaky"} == results["4t4i"]["losses"].keys()
    assert results["token_split"]["losses"].keys() == {"token"}
    assert results["4t4i"]["leaky_gap"]
    assert not results["dense"]["leaky_gap"]
    differences = contrasts(study, 2)
    ends = [study.record(Run(arm, 1e-2, 0, "test"))["curve"][-1]["losses"] for arm in ("4t4i", "token_split")]
    low, high = differences["4t4i - token_split"]["all"][1:]
    assert low <= ends[0]["all"] - ends[1]["all"] <= high
    assert results["token_split"]["active"]["token"] == results["token_split"]["parameters"]["active"]
    page = as_markdown(
        results, differences, {"4": {"dense": {"ratio": 1.0}, "4t4i": {"ratio": 0.9}}, "16": {"4t4i": {"ratio": 0.96}}}
    )
    assert "causal minus leaky" in page
    assert "| token_split |" in page
    assert "| -10.0 % | -4.0 % |" in page
    draw(study, results, study.folder / "study.png")
    assert (study.folder / "study.png").stat().st_size > 1000
    monkeypatch.setitem(all_arms.ARMS, "4t4i", {"preset": "4t4i", "norm_position": "post"})
    assert study.record(Run("4t4i", 1e-2, 0, "test")) is None  # another recipe


def test_a_longer_sweep_makes_its_own_runs_void_and_no_test_run(study, monkeypatch):
    runs = [Run("dense", 1e-2, 0, split) for split in ("val", "test")]
    before = [study.recipe(run) for run in runs]
    monkeypatch.setattr(study, "scale", replace(study.scale, sweep_steps=study.scale.sweep_steps + 1))
    val, test = (study.recipe(run) for run in runs)
    assert val != before[0]
    assert test == before[1]


def test_speed_is_beside_dense_in_the_same_rounds(study):
    speeds = measure(study, ["dense", "4t4i"], batch_rows=2, rounds=3)
    assert speeds["dense"]["ratio"] == 1
    assert 0 < speeds["4t4i"]["ratio"] < 10
    table = as_table({2: speeds}, length=128)
    assert list(table.columns[0].cells) == ["dense", "4t4i"]
    assert next(iter(table.columns[1].cells)).endswith("| +0.0%")
