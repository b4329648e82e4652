"""Stage projector: the projector alone learns, on captions; tower and language model stay as they are.

The first of LLaVA's two stages (2304.08485). Its `adapter/` folder holds `projector.safetensors`, which a
stage instruct takes as `model.start_from`.
"""

from typing import Literal

from pydantic import model_validator

from train.check import check_run as check
from train.config import TrainConfig
from train.run import run_stage as run

__all__ = ["Config", "check", "run"]


class Config(TrainConfig):
    """Its settings."""

    stage: Literal["projector"]

    @model_validator(mode="after")
    def projector_alone(self) -> "Config":
        if self.model.adapter is not None:
            raise ValueError(
                "stage projector trains the projector alone: leave model.adapter out, or set stage: instruct"
            )
        return self
