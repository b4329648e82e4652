"""Modules that have moved, under the names that they had: code written for an earlier release goes on.

Found last, so a module that exists is never hidden. Both names are one module, and a warning tells the new one.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "mllm.answering": "mllm.inference.answering",
    "mllm.console": "mllm.common.console",
    "mllm.cost": "mllm.mole.cost",
    "mllm.errors": "mllm.common.errors",
    "mllm.evaluate": "mllm.inference.evaluate",
    "mllm.generate": "mllm.inference.generate",
    "mllm.native_moe": "mllm.mole.native_moe",
    "mllm.peers": "mllm.inference.peers",
    "mllm.precision": "mllm.common.precision",
    "mllm.provenance": "mllm.common.provenance",
    "mllm.ranks": "mllm.common.ranks",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds the module behind a former name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        self.module = import_module(new)
        self.own_spec = self.module.__spec__
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """It has run under its new name; the import system has given it the spec of the old one."""
        module.__spec__ = self.own_spec


def find_moved_modules() -> None:
    """Let former names be imported. Further calls do nothing."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
