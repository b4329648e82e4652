"""Stage train_causal_routers: auxiliary routers learn to tell, from the past alone, what experts chose
(MoMa, 2407.21770).
"""

from typing import ClassVar, Literal

from train.moma.config import ContinuedConfig
from train.moma.run import check_moma as check
from train.moma.run import run_moma as run

__all__ = ["Config", "check", "run"]


class Config(ContinuedConfig):
    """Its settings."""

    stage: Literal["train_causal_routers"]
    unused: ClassVar = (
        "preset",
        "fields",
        "text_tokenizer",
        "image_tokenizer",
        "router_noise",
        "fresh",
        "keep_flops",
        "gradient_checkpointing",  # the model computes as it is, and only its auxiliary routers learn
    )
