"""Starts DeepSpeed's launcher on this machine: `python -m train.launch CONFIG.yaml section.key=value … --ranks N`."""

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from train.status import SIGNALS, STOPPED

# In this order HIP takes them: https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html
VISIBLE_DEVICES = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
ENDED_BY_SIGNAL = (256 - signal.SIGTERM, 128 + signal.SIGTERM)  # as DeepSpeed's launcher passes it on, and a shell


def launch(config_path: str | Path, overrides: list[str] | None = None, num_processes: int | None = None) -> int:
    """Trains one stage on several processes of this machine; returns the launcher's exit status.

    Args:
        config_path: YAML of the stage, or the name of a config that ships.
        overrides: `section.key=value` texts.
        num_processes: ranks; by default one a GPU that is visible, or two on a CPU.

    Raises:
        UserError: whatever is wrong with settings, data or base, found before anything is started.
    """
    import torch

    from mllm.common.processes import module_environment

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = number_of_ranks(num_processes, gpus)
    environment = module_environment()
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        threads = max(1, available_cores() // ranks)
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    from train.config import load_config
    from train.lock import STARTER, only_job
    from train.stages import check, run_alone

    config = load_config(config_path, overrides)
    with only_job(config.run.output_dir):
        check(config, ranks=ranks)
        if run_alone(config):
            return 0
        return run_to_end(ranks_command(config_path, overrides, ranks, gpus), environment | {STARTER: str(os.getpid())})


def ranks_command(config_path: str | Path, overrides: list[str] | None, ranks: int, gpus: int) -> list[str]:
    """What starts the ranks of this machine and ends when one of them fails."""
    from mllm.common.processes import module_command

    # DeepSpeed's launcher of one machine's ranks. Its `runner`, which starts it, drops CUDA_VISIBLE_DEVICES where a
    # number of ranks is given, and of the devices named there it knows those with a number only, not "GPU-…", "MIG-…".
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices_of_ranks(ranks, gpus)}).encode()).decode()
    command = module_command("train.ranks_of_machine", f"--world_info={world}", "--master_port", str(free_port()))
    return [*command, "--log_level", "error", "--module", "train", str(config_path), *(overrides or [])]


def number_of_ranks(asked: int | None, gpus: int) -> int:
    """Ranks to start. Raises UserError for fewer than one, and for more than there are GPUs, where there are any."""
    from mllm.common.errors import UserError

    if asked is not None and asked < 1:
        raise UserError(f"--ranks must be at least 1, got {asked}.")
    if asked and gpus and asked > gpus:
        named = next((f" ({name}={os.environ[name]})" for name in VISIBLE_DEVICES if os.environ.get(name)), "")
        raise UserError(f"--ranks {asked}, but {gpus} GPU(s) are visible{named}. Each rank needs one of its own.")
    return asked or gpus or 2


def devices_of_ranks(ranks: int, gpus: int) -> list[str | int]:
    """What names each rank's device, as the user's environment has it: a number, "GPU-…" or "MIG-…".

    DeepSpeed's launcher writes the names into CUDA_VISIBLE_DEVICES of every rank, so they must be those that stand
    there already, or the ranks would be given somebody else's devices.
    """
    named = next((os.environ[name] for name in VISIBLE_DEVICES if os.environ.get(name)), "") if gpus else ""
    devices = [device.strip() for device in named.split(",") if device.strip()]
    return devices[:ranks] if len(devices) >= ranks else list(range(ranks))


def run_to_end(command: list[str], environment: dict[str, str]) -> int:
    """Runs a launcher; its exit status.

    A signal to stop, whenever it comes, goes to all that the launcher started, which ends when it has saved. A second
    one ends all at once.
    """
    launcher, asked = None, 0

    def stop(*_: object) -> None:
        nonlocal asked
        asked += 1
        if launcher is not None:
            with suppress(ProcessLookupError):  # it may just have ended
                os.killpg(launcher.pid, signal.SIGTERM if asked == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        # a group of its own, so that a signal reaches the ranks at once, and whatever they have started
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        if asked:  # the signal came before there was anything to end
            asked = 0
            stop()
        status = launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked == 1 and status % 256 in ENDED_BY_SIGNAL:
        print("stopped before there was anything to save.", file=sys.stderr, flush=True)
        return STOPPED
    return status


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
    parser = argparse.ArgumentParser(prog="mllm train", description="Train one stage with DeepSpeed, on this machine.")
    parser.add_argument("config", type=Path, help="YAML of one stage, or the name of one that ships: experts")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings put over the file's")
    parser.add_argument("--ranks", type=int, help="processes; default: one a visible GPU, or two on a CPU")
    options = parser.parse_intermixed_args(arguments)
    from mllm.common.errors import UserError  # imports of seconds, after --help

    try:
        return launch(options.config, options.overrides, options.ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a stage of one process
        print("stopped before there was anything to save.", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
