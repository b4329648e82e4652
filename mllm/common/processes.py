"""How one process of this project starts another: by module name, as ours and nobody else's. Imports nothing heavy."""

import ctypes
import os
import signal
import site
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of our packages


def module_command(module: str, *arguments: str) -> list[str]:
    """``python -m module arguments``, to be run in `module_environment`."""
    return [sys.executable, "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """The environment in which `-m` finds our modules and Python's, whatever lies in the current folder.

    ``python -m`` looks into the current folder first, so a ``train.py`` or ``random.py`` that lies there would be run
    in place of ours or of Python's. PYTHONSAFEPATH forbids it, to what launchers start as well. A checkout that is used
    without being installed is then found by PYTHONPATH.
    """
    environment = dict(os.environ) | {"PYTHONSAFEPATH": "1"}
    installed = {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
    if ROOT not in installed:  # PYTHONPATH comes before Python's own modules, which site-packages must not
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(ROOT))]
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *others])
    return environment


def become(module: str, *arguments: str) -> None:
    """Replaces this process by the module's: signals and the exit status are then its own."""
    os.environ.update(module_environment())
    os.execv(sys.executable, module_command(module, *arguments))


def end_with_parent(parent: str | None = None) -> None:
    """From now on this process is killed when the one that started it ends, however that ends. Linux only.

    Args:
        parent: the id of the process that started this one, where it is known: it may have ended already.
    """
    if not sys.platform.startswith("linux"):
        return
    death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)
    if parent is not None and str(os.getppid()) != parent:
        os.kill(os.getpid(), signal.SIGKILL)
