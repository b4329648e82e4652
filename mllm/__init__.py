"""Multimodal LLaVA-style models with sparse LoRA experts.

Importing this package registers the open_clip vision tower with transformers' Auto classes and the ``MOLE`` method
with PEFT, so that ``from_pretrained`` finds both.
"""

from mllm.build import build, load
from mllm.errors import UserError
from mllm.mole import MoleConfig

__all__ = ["MoleConfig", "UserError", "build", "load"]
