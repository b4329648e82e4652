"""Two ranks of the real engine without the launcher: forked from a process that has everything imported already, they
are there in a second instead of twenty. On the CPU, also where there is a GPU: a process that holds one cannot fork.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from train.__main__ import main
from train.launch import free_port

RANKS = 2
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run_stage(
    config: Path, *overrides: str, world: int = RANKS, status: int = 0, target: Callable | None = None
) -> None:
    """`python -m train` on every rank; returns when all are done, all of them well, or with the status given.

    `target` may stand for `be_rank`, to spoil something beforehand.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train.run"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU.items():
            patch.setenv(name, value)  # as the fork server starts, with the first run
        arguments, port = [str(config), *overrides], str(free_port())
        ranks = [
            processes.Process(target=target or be_rank, args=(rank, world, port, arguments)) for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [status] * world


def be_rank(rank: int, world: int, port: str, arguments: list[str]) -> None:
    """What the launcher would start: the command line, told its rank by the environment."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    sys.exit(main(arguments))
