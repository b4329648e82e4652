"""Stage pretrain_moma: an early-fusion model with modality-aware experts learns from nothing (MoMa, 2407.21770)."""

from typing import ClassVar, Literal

from pydantic import model_validator

from train.moma.config import MomaTrainConfig
from train.moma.run import check_moma as check
from train.moma.run import run_moma as run

__all__ = ["Config", "check", "run"]


class Config(MomaTrainConfig):
    """Its settings."""

    stage: Literal["pretrain_moma"]
    unused: ClassVar = ("router_noise", "fresh")  # MomaConfig's router_noise is one of `fields`

    @model_validator(mode="after")
    def begins_anew(self) -> "Config":
        if self.model.start_from is not None:
            raise ValueError("stage pretrain_moma starts anew: leave model.start_from out, or set stage: upcycle")
        if self.model.image_tokenizer is None:
            raise ValueError("stage pretrain_moma needs model.image_tokenizer: train one first, stage image_tokenizer")
        return self
