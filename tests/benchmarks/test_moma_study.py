"""The study's arithmetic on curves whose answer is known, and a smoke run of three arms."""

import pytest

from benchmarks import moma_study
from benchmarks.moma_study import ARMS, SCALES, Run, Study, analyse, arm_config, as_markdown, bootstrap, eta
from mllm.moma import MomaForCausalLM
from tests.train.moma_data import write_image_tokenizer


def curve(losses, step=100.0):
    return [{"flops": step * 2**k, "losses": {"all": loss}} for k, loss in enumerate(losses)]


def test_an_arm_that_is_always_one_doubling_ahead_has_eta_two():
    dense, arm = curve([4.0, 3.0, 2.0, 1.0]), curve([3.0, 2.0, 1.0, 0.5])
    assert eta(arm, dense) == pytest.approx(2)
    assert eta(dense, arm) == pytest.approx(0.5)


def test_an_arm_like_dense_has_eta_one_and_noise_upwards_does_not_matter():
    assert eta(curve([3, 2, 1]), curve([3, 2, 1])) == pytest.approx(1)
    assert eta(curve([3, 2, 2.5, 1]), curve([3, 2, 2, 1])) == pytest.approx(1)


def test_bootstrap_of_equal_values_has_no_width_and_of_others_holds_the_mean():
    assert bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    mean, low, high = bootstrap([1.0, 2.0, 3.0, 4.0])
    assert low < mean == 2.5 < high


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
    for run in study.due(arms, 2, 2):
        study.carry_out(run)
    assert not list(study.due(arms, 2, 2))
    results = analyse(study, arms, 2)
    assert results["dense"]["eta"]["flops"]["all"] == pytest.approx([1, 1, 1])
    assert results["4t4i"]["seeds"] == 2
    assert {"threshold", "aux", "batch_leaky"} == results["4t4i"]["losses"].keys()
    assert results["token_split"]["losses"].keys() == {"token"}
    assert results["4t4i"]["leaky_gap"]
    assert not results["dense"]["leaky_gap"]
    page = as_markdown(results)
    assert "causal minus leaky" in page
    assert "| token_split |" in page
    monkeypatch.setitem(moma_study.ARMS, "4t4i", {"preset": "4t4i", "norm_position": "post"})
    assert study.kept(Run("4t4i", 1e-2, 0, "test")) is None  # another recipe
