"""The stages of training, one file each, found by its name: `stage: instruct` is `train/stages/instruct.py`.

A stage's file holds
    Config                    its settings, a `train.config.Section` with `stage: Literal["<name of the file>"]`
    check(config, ranks=N)    what can be found wrong before the start, told as a UserError; returns what `run` takes
    run(config, checked)      the work of one rank, with RANK, LOCAL_RANK and WORLD_SIZE in the environment
    IS_ALONE = True           only where the stage is one process without DeepSpeed
Nothing else has to be told of a new one; a contract test tries every file here.
"""

import os
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from mllm.common.errors import UserError

OLD_NAMES = {"align": "projector", "align_routers": "routers"}


def names() -> list[str]:
    """All stages, in alphabetical order."""
    return sorted(module.name for module in iter_modules(__path__))


def find(name: str) -> ModuleType:
    """The module of a stage, imported when asked for: some take seconds. Raises ValueError for an unknown name."""
    if name not in names():
        raise ValueError(f"no stage {name!r}")
    return import_module(f"{__name__}.{name}")


def check(config: Any, *, ranks: int) -> Any:
    """Whatever of a run can be found wrong before it starts, told as a UserError. Returns what `run` goes on with."""
    stage = find(config.stage)
    if not is_alone(stage):
        from train.check import check_dtype  # imports torch and the whole library

        check_dtype(config.model.dtype)
    return stage.check(config, ranks=ranks)


def run(config: Any, checked: Any) -> None:
    """One stage on one rank, with what `check` returned."""
    if not run_alone(config, checked):
        find(config.stage).run(config, checked)


def run_alone(config: Any, checked: Any = None) -> bool:
    """Runs a stage that is one process without DeepSpeed; false for any other.

    Raises UserError where a launcher has started several.
    """
    stage = find(config.stage)
    if not is_alone(stage):
        return False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"stage {config.stage} is one process: start it by `mllm train`, or `python -m train`.")
    stage.run(config, checked)
    return True


def is_alone(stage: ModuleType) -> bool:
    """Whether a stage is one process without DeepSpeed."""
    return getattr(stage, "IS_ALONE", False)
