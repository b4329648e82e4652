"""Stage instruct: an adapter learns from instructions, and the projector with it unless told otherwise.

The second of LLaVA's two stages, with LoRA or sparse LoRA experts (LLaVA-MoLE, 2401.16160) in place of all weights.
"""

from typing import Literal

from pydantic import model_validator

from train.check import check_run as check
from train.config import TrainConfig
from train.run import run_stage as run

__all__ = ["Config", "check", "run"]


class Config(TrainConfig):
    """Its settings."""

    stage: Literal["instruct"]

    @model_validator(mode="after")
    def something_to_train(self) -> "Config":
        if self.model.adapter is None and self.model.start_from is None:
            raise ValueError("stage instruct needs model.adapter ({type: mole} or {type: lora}), or model.start_from")
        return self
