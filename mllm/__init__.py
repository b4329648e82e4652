"""Multimodal LLaVA-style models with sparse LoRA experts.

Importing this package registers the open_clip vision tower and MoMa with transformers' Auto classes and the ``MOLE``
method with PEFT, so that ``from_pretrained`` finds them.
"""

from mllm import native_moe
from mllm.build import build, load
from mllm.errors import UserError
from mllm.mole import (
    BiasBalance,
    MoleConfig,
    RoutingLossMixin,
    RoutingObjective,
    routing_context,
    routing_loss,
    start_routers,
)
from mllm.moma import MomaConfig, MomaForCausalLM

__all__ = [
    "BiasBalance",
    "MoleConfig",
    "MomaConfig",
    "MomaForCausalLM",
    "RoutingLossMixin",
    "RoutingObjective",
    "UserError",
    "build",
    "load",
    "native_moe",
    "routing_context",
    "routing_loss",
    "start_routers",
]
