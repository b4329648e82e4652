"""Multimodal LLaVA-style models with sparse LoRA experts.

Importing this package registers the open_clip vision tower and MoMa with transformers' Auto classes and the ``MOLE``
method with PEFT, so that ``from_pretrained`` finds them. In a process of the ``mllm`` command, where nobody else's
code runs, that waits until a name is asked for: it takes seconds, and ``mllm --help`` needs nothing of it.
"""

import sys
from pathlib import Path

from mllm.errors import UserError

__all__ = ["MoleConfig", "MomaConfig", "MomaForCausalLM", "UserError", "build", "load"]


def register() -> None:
    """Imports every public name, which registers tower, MoMa and MOLE. Further calls do nothing."""
    from mllm.build import build, load
    from mllm.mole import MoleConfig
    from mllm.moma import MomaConfig, MomaForCausalLM

    globals().update(
        build=build, load=load, MoleConfig=MoleConfig, MomaConfig=MomaConfig, MomaForCausalLM=MomaForCausalLM
    )


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return globals()[name]


def _is_the_command() -> bool:
    """Whether this process was started as `mllm …` or `python -m mllm.cli …`."""
    return Path(sys.argv[0]).name in ("mllm", "mllm.exe") or (sys.argv[0] == "-m" and "mllm.cli" in sys.orig_argv)


if not _is_the_command():
    register()
