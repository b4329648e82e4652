"""The arms, and the sizes they are compared at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm.moma import MomaConfig, MomaForCausalLM, layers_at_equal_flops
from mllm.moma.expert_choice import ChoiceRouter
from mllm.moma.processor import MomaProcessor

DENSE, MAIN, FROZEN = "dense", "4t4i", "4t4i_frozen"
TOKEN_CHOICE = {"routing": "token_choice", "num_experts_per_tok": 1, "balance": "global_batch"}
ARMS: dict[str, dict[str, Any]] = {
    DENSE: {"preset": "dense"},
    "8x": {"preset": "8x"},
    "1t1i": {"preset": "1t1i"},
    "2t2i": {"preset": "2t2i"},
    MAIN: {"preset": "4t4i"},
    "4t4i_post": {"preset": "4t4i", "norm_position": "post"},
    FROZEN: {"preset": "4t4i"},  # the control: routers stay as they were drawn
    "mod_4t4i": {"preset": "4t4i", "mixture_of_depths": 0.25},
    "dense_total": {"preset": "dense"},  # as many parameters as 4t4i has, all of them active
    "token_agnostic": {"preset": "8x", **TOKEN_CHOICE},
    "token_split": {"preset": "4t4i", **TOKEN_CHOICE},
    "shared": {"preset": "3t3i2s"},  # of the eight experts two are open to both modalities (MoIIE, 2508.09779)
}


@dataclass(frozen=True)
class Scale:
    """A size of the study. `fields` are of MomaConfig; without `scenes` the pictures are those of caption files."""

    fields: dict[str, Any]
    steps: int
    batch_rows: int
    length: int
    points: int  # of a curve
    scenes: int
    held_out: int
    auxiliary_steps: int
    sweep_steps: int  # that a rate is tried for
    rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)
    warmup: int = 20  # steps


def shape(width: int, inner: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    """The fields of MomaConfig that all arms share."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "norm_position": "pre",
        "threshold_momentum": 0.9,  # runs are short: the mean of the last tens of batches
    }


SMALL = shape(96, 192, 6, 4, 256)  # 1.05M active, two fifths of them in embeddings
SCALES = {
    "smoke": Scale(shape(16, 24, 2, 2, 128), 6, 2, 128, 2, 40, 16, 2, 2, rates=(1e-2,), warmup=1),
    "cpu": Scale(SMALL, 600, 4, 256, 8, 8_000, 96, 100, sweep_steps=600),
    "real": Scale(SMALL, 600, 4, 256, 8, 0, 96, 100, sweep_steps=600),
    "gpu": Scale(  # 28M
        shape(512, 1376, 8, 8, 1024), 8000, 64, 1024, 20, 200_000, 2048, 800, 8000, (5e-4, 1e-3, 2e-3), 400
    ),
}


def arm_config(arm: str, scale: Scale, processor: MomaProcessor) -> MomaConfig:
    """The arm's model. Mixture of depths gets more layers, the dense model of equal total size a wider FFN."""
    settings = {**processor.config_fields, **scale.fields, **ARMS[arm]}
    preset = settings.pop("preset")
    if arm == "mod_4t4i":
        settings["num_hidden_layers"] = layers_at_equal_flops(settings["num_hidden_layers"], 0.25)
    if arm == "dense_total":
        settings["intermediate_size"] *= MomaConfig.preset(ARMS[MAIN]["preset"]).layout.num_experts
    return MomaConfig.preset(preset, **settings)


def arm_model(arm: str, scale: Scale, processor: MomaProcessor) -> MomaForCausalLM:
    """The arm's model, new."""
    model = MomaForCausalLM(arm_config(arm, scale, processor))
    if arm == FROZEN:
        for module in model.modules():
            if isinstance(module, ChoiceRouter):
                module.requires_grad_(False)
    return model
