"""The generated dictionary is one that DeepSpeed takes."""

import pytest

from train.config import TrainConfig
from train.zero import deepspeed_config


def settings(**deepspeed) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "stage": "projector",
            "model": {"path": "base"},
            "data": {"mixture": "m.yaml"},
            "run": {"output_dir": "out", "steps": 1, "batch_size": 16, "micro_batch_size": 4},
            "deepspeed": deepspeed,
        }
    )


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_deepspeed_accepts_every_stage_with_and_without_offload(zero, offload):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = deepspeed_config(settings(zero=zero, offload=offload), accumulation=4)["zero_optimization"]
    parsed = DeepSpeedZeroConfig(**section)
    assert parsed.stage == zero
    assert (parsed.offload_optimizer is not None) == offload
    assert (parsed.offload_param is not None) == (offload and zero == 3)


def test_the_size_below_which_weights_stay_whole_reaches_deepspeed():
    section = deepspeed_config(settings(zero=3, persist_below=7), accumulation=4)["zero_optimization"]
    assert section["stage3_param_persistence_threshold"] == 7


def test_fp32_leaves_autocast_off():
    config = settings()
    config.model.dtype = "bf16"
    assert deepspeed_config(config, accumulation=4)["torch_autocast"]["enabled"]
    config.model.dtype = "fp32"
    assert not deepspeed_config(config, accumulation=4)["torch_autocast"]["enabled"]
