"""`python -m train CONFIG.yaml section.key=value …`, by itself or started on every rank by the DeepSpeed launcher."""

import argparse
import os
import shutil
import socket
import sys
from pathlib import Path

from mllm.errors import UserError
from train.config import TrainConfig, load_config


def main(arguments: list[str] | None = None) -> int:
    """Trains one stage. Returns the exit status: 0, or 2 after a mistake of the user's, told in words on stderr."""
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML of one stage, such as train/configs/mole.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings put over the file's")
    parser.add_argument("--local_rank", type=int, help="given by the DeepSpeed launcher")
    options = parser.parse_args(arguments)
    join_launcher()
    config = None
    try:
        config = load_config(options.config, options.overrides)
        train(config)
    except UserError as error:
        rank = int(os.environ["RANK"])
        print(f"error: {f'(rank {rank}) ' if rank else ''}{original_message(error)}", file=sys.stderr, flush=True)
        return 2
    return 0


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


def train(config: TrainConfig) -> None:
    """Check, then run; a new folder in which nothing was saved yet does not outlive a mistake in the data."""
    from train.check import CHECKPOINTS, check_run
    from train.run import run_stage

    mixture = check_run(config, ranks=int(os.environ["WORLD_SIZE"]))
    folder = config.run.output_dir
    is_new = not folder.exists()
    try:
        run_stage(config, mixture)
    except UserError:
        if is_new and not list((folder / CHECKPOINTS).glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def original_message(error: UserError) -> str:
    """The message, also of an error that comes from a data-loading process wrapped in that process's traceback."""
    return str(error).rsplit("Error: ", 1)[-1].strip() if "Traceback" in str(error) else str(error)


if __name__ == "__main__":
    sys.exit(main())
