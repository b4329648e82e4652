"""Stage upcycle: an early-fusion model gets more experts, copies of its own, and learns on (MoMa, 2407.21770)."""

from typing import ClassVar, Literal

from train.moma.config import ContinuedConfig
from train.moma.run import check_moma as check
from train.moma.run import run_moma as run

__all__ = ["Config", "check", "run"]


class Config(ContinuedConfig):
    """Its settings."""

    stage: Literal["upcycle"]
    unused: ClassVar = ("text_tokenizer", "keep_flops")
