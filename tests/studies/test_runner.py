"""Jobs are run once, in order, by as many processes as share a folder; tried on a study that trains nothing."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from studies import runner
from studies.runner import Job, PairedSeeds, RunFolder, locked, run_all

QUIET = Console(quiet=True)
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Arm:
    name: str


ARMS = (Arm("mix"), Arm("experts"))


class Toy:
    """A study that counts what it ran; `version` stands for all that a recipe names."""

    def __init__(self, folder, version=1, seeds=2):
        self.plan = PairedSeeds("toy", ARMS, seeds, lambda arm, seed: f"{arm.name} {seed} {version}")
        self.runs, self.ran = RunFolder(folder), []

    def run(self, job):
        self.ran.append(job)
        return {"score": job.seed}, {"right": np.arange(3)}

    def run_all(self, **limits):
        return run_all(self.plan, self.run, self.runs, QUIET, describe=str, **limits)


def test_every_arm_of_a_seed_is_run_before_the_next_seed_and_nothing_twice(tmp_path):
    toy = Toy(tmp_path)
    assert toy.run_all() == toy.plan.size == 4
    assert toy.ran == [Job(arm, seed) for seed in (0, 1) for arm in ARMS]
    assert toy.run_all() == 0


def test_a_record_says_by_which_recipe_and_commit_it_was_made(tmp_path):
    toy = Toy(tmp_path, seeds=1)
    toy.run_all()
    record = toy.runs.record("toy-mix-s0")
    assert (record["score"], record["recipe"]) == (0, "mix 0 1")
    assert {"commit", "device"} <= record["made"].keys()
    assert toy.runs.arrays("toy-mix-s0")["right"].tolist() == [0, 1, 2]


def test_a_run_by_another_recipe_counts_as_not_there(tmp_path):
    Toy(tmp_path).run_all()
    changed = Toy(tmp_path, version=2)
    assert changed.plan.complete_seeds(changed.runs) == []
    assert changed.run_all() == 4


def test_only_seeds_of_which_every_arm_is_there_are_complete(tmp_path):
    toy = Toy(tmp_path)
    toy.run_all()
    (tmp_path / "toy-experts-s0.json").unlink()
    assert toy.plan.complete_seeds(toy.runs) == [1]


def test_a_run_that_fails_leaves_no_record_and_is_free_again(tmp_path):
    toy = Toy(tmp_path, seeds=1)

    def fail(job):
        raise RuntimeError(job.arm.name)

    with pytest.raises(RuntimeError, match="mix"):
        run_all(toy.plan, fail, toy.runs, QUIET, describe=str)
    assert toy.run_all() == 2


def test_a_job_that_another_process_is_at_is_passed_over_and_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    toy = Toy(tmp_path, seeds=1)
    with locked(tmp_path / "toy-mix-s0.lock"):
        assert toy.run_all(limit_minutes=0.2 / 60) == 1
    assert Counter(job.arm.name for job in toy.ran) == {"experts": 1}
    assert toy.run_all() == 1


def hang(folder: Path) -> None:
    """Claims a run and never ends it."""
    with RunFolder(folder / "runs").claim("run", "a recipe") as mine:
        (folder / "claimed").write_text(str(mine))
        time.sleep(60)


def test_a_run_whose_process_was_killed_is_free_again(tmp_path):
    process = FORK.Process(target=hang, args=(tmp_path,))
    process.start()
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    runs = RunFolder(tmp_path / "runs")
    with runs.claim("run", "a recipe") as mine:
        assert not mine
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with runs.claim("run", "a recipe") as mine:
        assert mine
        runs.write("run", {"recipe": "a recipe"})
    with runs.claim("run", "a recipe") as mine:
        assert not mine  # finished
