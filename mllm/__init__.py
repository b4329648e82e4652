"""Multimodal LLaVA-style models with sparse LoRA experts.

Importing this package registers the open_clip vision tower and MoMa with transformers' Auto classes and the ``MOLE``
method with PEFT, so that ``from_pretrained`` finds them.
"""

from mllm.build import build, load
from mllm.errors import UserError
from mllm.mole import MoleConfig
from mllm.moma import MomaConfig, MomaForCausalLM

__all__ = ["MoleConfig", "MomaConfig", "MomaForCausalLM", "UserError", "build", "load"]
