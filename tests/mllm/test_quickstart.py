"""What the quickstart says of a report, and what it trains."""

import pytest

from mllm.quickstart import TRAININGS, in_words
from train.config import load_config
from train.parts import adapter_config


def report(cost, wide, experts, over_wide):
    def figures(points):
        return {"mean": {"difference": points / 100, "ci_low": (points - 2) / 100, "ci_high": (points + 2) / 100}}

    scores = {"base": 0.02, "lora_apart": 0.40, "lora": 0.20, "wide_lora": 0.21, "experts": 0.42}
    return {
        "arms": {name: {"mean": {"score": score}} for name, score in scores.items()},
        "differences": {
            "lora": {"lora_apart": figures(-cost)},
            "wide_lora": {"lora": figures(wide)},
            "experts": {"lora": figures(experts), "wide_lora": figures(over_wide)},
        },
    }


def test_the_cost_of_mixing_and_who_gets_it_back_is_said_in_points():
    text = "\n".join(in_words(report(cost=20, wide=1, experts=22, over_wide=21)))
    assert "mixing costs +20.0 points [+18.0, +22.0]" in text
    assert "Experts get back more than LoRA of as many weights: +21.0 points [+19.0, +23.0]" in text


def test_a_cost_whose_interval_holds_zero_is_not_claimed():
    text = "\n".join(in_words(report(cost=1, wide=0, experts=1, over_wide=1)))
    assert "Mixing costs nothing shown: +1.0 points [-1.0, +3.0]" in text
    assert "no more than is told from LoRA of as many weights" in text


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
def test_every_training_of_the_quickstart_has_settings_that_hold(training):
    settings = {**training.settings, "run.output_dir": "out"}
    config = load_config(f"train/configs/{training.config}.yaml", [f"{k}={v}" for k, v in settings.items()])
    assert adapter_config(config.model).r in (2, 6)


def test_the_wide_lora_has_as_many_weights_as_the_experts():
    ranks = {training.name: training.settings for training in TRAININGS}
    experts = ranks["experts"]["model.adapter.r"] * ranks["experts"]["model.adapter.num_experts"]
    assert ranks["wide_lora"]["model.adapter.r"] == experts
