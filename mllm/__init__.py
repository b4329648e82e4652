"""Multimodal LLaVA-style models with sparse LoRA experts.

Importing this package registers the open_clip vision tower and MoMa with transformers' Auto classes and the ``MOLE``
method with PEFT, so that ``from_pretrained`` finds them. In a process of the ``mllm`` command, where nobody else's
code runs, that waits until a name is asked for: it takes seconds, and ``mllm --help`` needs nothing of it.
"""

import sys
from importlib import import_module
from pathlib import Path

from mllm.common.errors import UserError
from mllm.moved import find_moved_modules

# Public name -> the module it comes from; a name that is a module's own stands for that module.
_HOMES = {
    "BiasBalance": "mllm.mole",
    "MoleConfig": "mllm.mole",
    "MomaConfig": "mllm.moma",
    "MomaForCausalLM": "mllm.moma",
    "RoutingLossMixin": "mllm.mole",
    "RoutingObjective": "mllm.mole",
    "build": "mllm.build",
    "load": "mllm.build",
    "native_moe": "mllm.mole.native_moe",
    "routing_context": "mllm.mole",
    "routing_loss": "mllm.mole",
    "start_routers": "mllm.mole",
}
__all__ = [
    "BiasBalance",
    "MoleConfig",
    "MomaConfig",
    "MomaForCausalLM",
    "RoutingLossMixin",
    "RoutingObjective",
    "UserError",
    "build",
    "load",
    "native_moe",
    "routing_context",
    "routing_loss",
    "start_routers",
]


def register() -> None:
    """Imports every public name, which registers tower, MoMa and MOLE. Further calls do nothing."""
    for name, home in _HOMES.items():
        module = import_module(home)
        globals()[name] = module if home.endswith(f".{name}") and not hasattr(module, name) else getattr(module, name)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return globals()[name]


def _is_the_command() -> bool:
    """Whether this process was started as `mllm …` or `python -m mllm.cli …`."""
    return Path(sys.argv[0]).name in ("mllm", "mllm.exe") or (sys.argv[0] == "-m" and "mllm.cli" in sys.orig_argv)


find_moved_modules()
if not _is_the_command():
    register()
