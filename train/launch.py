"""Starts DeepSpeed's launcher on this machine: `python -m train.launch CONFIG.yaml section.key=value … --ranks N`."""

import argparse
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from mllm.errors import UserError
from train.config import load_config


def launch(config_path: str | Path, overrides: list[str] | None = None, num_processes: int | None = None) -> int:
    """Trains one stage on several processes of this machine; returns the launcher's exit status.

    Args:
        config_path: YAML of the stage, or the name of a config that ships.
        overrides: `section.key=value` texts.
        num_processes: ranks; by default one a GPU, or two on a CPU.

    Raises:
        UserError: whatever is wrong with settings, data or base, found before anything is started.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = num_processes or gpus or 2
    environment = dict(os.environ)
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        threads = max(1, available_cores() // ranks)
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    from train.stages import check, run_alone

    config = load_config(config_path, overrides)
    check(config, ranks=ranks)
    if run_alone(config):
        return 0
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port()), "--log_level", "error", "--module", "train"]
    # a group of its own, so that a signal reaches the ranks too: DeepSpeed's runner does not pass it on
    launcher = subprocess.Popen(
        [*command, str(config_path), *(overrides or [])], env=environment, start_new_session=True
    )
    return wait_for(launcher)


def wait_for(launcher: subprocess.Popen) -> int:
    """The launcher's exit status. A signal to end goes to its whole group, lest the ranks run on."""

    def stop(*_: object) -> None:
        with suppress(ProcessLookupError):  # it may just have ended
            os.killpg(launcher.pid, signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A port nobody listens on, so that two runs on one machine do not meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main(arguments: list[str] | None = None) -> int:
    """The command line of `launch`. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m train.launch", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML of one stage, or the name of one that ships, such as experts")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--ranks", type=int, help="processes; default: one a GPU, or two on a CPU")
    options = parser.parse_intermixed_args(arguments)
    try:
        return launch(options.config, options.overrides, options.ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
