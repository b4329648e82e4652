"""`python -m train CONFIG.yaml section.key=value …`, by itself or started on every rank by the DeepSpeed launcher."""

import argparse
import atexit
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mllm.common.processes import end_with_parent
from train.status import STOPPED, Stopped

if TYPE_CHECKING:
    from mllm.common.errors import UserError
    from train.config import TrainConfig


def main(arguments: list[str] | None = None) -> int:
    """Trains one stage. Returns the exit status.

    0, or 2 after a mistake of the user's, told in words on stderr, and on the other ranks of a run that such a mistake
    has stopped; or 75 where it was asked to stop, and the same command goes on.
    """
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML of one stage, or the name of one that ships, such as experts")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings put over the file's")
    parser.add_argument("--local_rank", type=int, help="given by the DeepSpeed launcher")
    options = parser.parse_intermixed_args(arguments)
    from mllm.common.errors import UserError  # imports of seconds, after --help
    from train.config import load_config

    join_launcher()
    try:
        train(load_config(options.config, options.overrides))
    except UserError as error:
        return say(f"error: {original_message(error)}")
    except KeyboardInterrupt:
        return say("stopped before there was anything to save.", STOPPED)
    except Stopped as stopped:
        return say(str(stopped), STOPPED) if os.environ["RANK"] == "0" else STOPPED
    except RuntimeError as error:
        if dead := re.search(r"DataLoader worker \(pid.*?\d\) (.*?)\W*$", str(error), re.MULTILINE):
            return say(
                f"error: a process that reads rows {dead[1]}. Where the machine ran out of memory, lower data.workers;"
                " the same command goes on from the last checkpoint."
            )
        if "closed by peer" not in str(error):  # gloo's words for a rank that is gone
            raise
        return say("stopped, because another rank did: see its message.")
    return 0


def say(message: str, status: int = 2) -> int:
    """Puts a message on stderr, with the rank where it is not the first. Returns the exit status."""
    rank = os.environ["RANK"]
    print(message if rank == "0" else f"rank {rank}: {message}", file=sys.stderr, flush=True)
    return status


def join_launcher() -> None:
    """Without a launcher, be the only rank; without a GPU, tell DeepSpeed before it is imported."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loading processes are the parallelism


def train(config: "TrainConfig") -> None:
    """Check, then run; a new folder in which nothing was saved or logged yet does not outlive a mistake in the data."""
    from mllm.common.errors import UserError
    from train.check import CHECKPOINTS
    from train.lock import holds_nothing, only_job
    from train.stages import check, run

    folder = config.run.output_dir
    with only_job(folder, rank=int(os.environ["RANK"])):
        checked = check(config, ranks=int(os.environ["WORLD_SIZE"]))
        is_new = holds_nothing(folder)
        try:
            run(config, checked)
        except UserError:
            if is_new and not list((folder / CHECKPOINTS).glob("checkpoint-*")) and not logged(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def logged(folder: Path) -> bool:
    """Whether a run has anything to tell yet."""
    from train.trainer import LOG

    return (folder / LOG).is_file() and (folder / LOG).stat().st_size > 0


def original_message(error: "UserError") -> str:
    """The message, also of an error from a data-loading process, which torch wraps in that process's traceback."""
    if "Original Traceback" not in str(error):
        return str(error)
    return re.split(r"^[\w.]+Error: ", str(error), flags=re.MULTILINE)[-1].strip()


def leave(status: int | None) -> None:
    """Ends the process here, without Python's finalisation; None, after an exception, leaves it to Python.

    A thread of gloo lets go of a collective's tensors after the collective has returned. On a busy machine Python may
    be finalising by then, and the thread that asks for its lock aborts a run whose work is done (SIGABRT, "terminate
    called without an active exception": pytorch issue 190489). `destroy_process_group` joins the threads of the groups
    that nothing else holds, and DeepSpeed's engine holds its own to the end.
    """
    if status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    status = None
    if "RANK" in os.environ:
        end_with_parent(os.environ.get("MLLM_STARTER"))
    atexit.register(lambda: leave(status))  # registered first, so that it runs last
    status = main()
