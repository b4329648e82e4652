"""Which stage's check and run belong to which settings. Each is imported when it is due: they take seconds to load."""

import os
from typing import Any

from mllm.errors import UserError
from train.config import TrainConfig
from train.moma.config import ImageTokenizerConfig


def check(config: Any, *, ranks: int) -> Any:
    """Whatever of a run can be found wrong before it starts, told as a UserError. Returns what `run` goes on with."""
    from train.check import check_dtype

    if not isinstance(config, ImageTokenizerConfig):
        check_dtype(config.model.dtype)
    if isinstance(config, TrainConfig):
        from train.check import check_run

        return check_run(config, ranks=ranks)
    if isinstance(config, ImageTokenizerConfig):
        from train.moma.image_tokenizer import check_image_tokenizer

        return check_image_tokenizer(config)
    from train.moma.run import check_moma

    return check_moma(config, ranks=ranks)


def run(config: Any, checked: Any) -> None:
    """One stage on one rank, with what `check` returned."""
    if isinstance(config, TrainConfig) and config.stage == "align_routers":
        from train.align import run_alignment

        run_alignment(config, checked)
    elif isinstance(config, TrainConfig):
        from train.run import run_stage

        run_stage(config, checked)
    elif not run_alone(config):
        from train.moma.run import run_moma

        run_moma(config)


def run_alone(config: Any) -> bool:
    """Runs a stage that is one process without DeepSpeed; false for any other.

    Raises UserError where a launcher has started several.
    """
    if not isinstance(config, ImageTokenizerConfig):
        return False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("stage image_tokenizer is one process: start it by `mllm train`, or `python -m train`.")
    from train.moma.image_tokenizer import train_image_tokenizer

    train_image_tokenizer(config)
    return True
