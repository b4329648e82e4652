"""A study goes on where it stopped, and processes share it."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from studies import runner
from studies.conflict.report import report
from studies.conflict.study import Study
from studies.conflict.work import work
from studies.runner import RunFolder
from tests.studies.conflict.toy import FACTS, SHARES, ToyWorker, toy_config

QUIET = Console(quiet=True)
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def summary_of(folder: Path) -> dict:
    """The report without when and where it was made."""
    worker = ToyWorker(folder)
    found = report(worker.study, RunFolder(folder / "runs"), QUIET)
    return {key: value for key, value in found.items() if key not in ("provenance", "made")}


def test_every_arm_tries_every_rate_and_is_scored_at_its_best_with_other_seeds(tmp_path):
    worker = ToyWorker(tmp_path, tune_seeds=2)
    assert work(worker, RunFolder(tmp_path / "runs"), QUIET) == worker.study.size == 4 * (2 * 2 + 3)
    for arm in worker.study.config.arms:
        jobs = [job for job in worker.jobs if job.arm == arm]
        assert sorted(job.rate for job in jobs if job.split == "val") == [1e-3, 1e-3, 1e-2, 1e-2]
        assert [(job.rate, job.seed) for job in jobs if job.split == "test"] == [(1e-2, 0), (1e-2, 1), (1e-2, 2)]
        assert not {job.seed for job in jobs if job.split == "val"} & {0, 1, 2}


def test_an_arm_that_validation_alone_looks_at_is_never_scored_on_test(tmp_path):
    worker = ToyWorker(tmp_path, arms=["single", "mix"], only_tuned=["mole"])
    assert work(worker, RunFolder(tmp_path / "runs"), QUIET) == worker.study.size == 2 * (2 + 3) + 2
    assert {job.split for job in worker.jobs if job.arm.name == "mole"} == {"val"}


def test_the_untrained_base_has_no_rate_to_choose(tmp_path):
    worker = ToyWorker(tmp_path, SHARES | {"base": 0.1}, arms=["base", "single", "mix"])
    assert work(worker, RunFolder(tmp_path / "runs"), QUIET) == worker.study.size == 3 + 2 * (2 + 3)
    assert {job.split for job in worker.jobs if job.arm.name == "base"} == {"test"}


def test_equal_shares_are_told_apart_by_loss(tmp_path):
    worker = ToyWorker(tmp_path)
    runs, arm = RunFolder(tmp_path / "runs"), worker.study.config.arms[0]
    for job, loss in zip(worker.study.tuning(arm), (0.4, 0.5), strict=True):
        record, arrays = worker.run(job)
        runs.write(worker.study.name(job), record | {"exact": 0.5, "loss": loss}, arrays)
    assert worker.study.chosen_rate(arm, runs) == 1e-3


def test_a_study_that_was_killed_ends_with_the_same_summary(tmp_path):
    class Killed(ToyWorker):
        def run(self, job):
            if len(self.jobs) == 5:
                raise KeyboardInterrupt
            return super().run(job)

    work(ToyWorker(tmp_path / "whole"), RunFolder(tmp_path / "whole" / "runs"), QUIET)
    runs = RunFolder(tmp_path / "killed" / "runs")
    with pytest.raises(KeyboardInterrupt):
        work(Killed(tmp_path / "killed"), runs, QUIET)
    (runs.path / "half-written.part").write_text("{")
    again = ToyWorker(tmp_path / "killed")
    assert work(again, runs, QUIET) == again.study.size - 5
    assert work(again, runs, QUIET) == 0
    assert json.dumps(summary_of(tmp_path / "killed")).replace("killed", "whole") == json.dumps(
        summary_of(tmp_path / "whole")
    )


def test_a_changed_recipe_is_run_again_and_the_old_run_kept(tmp_path):
    runs = RunFolder(tmp_path / "runs")
    work(ToyWorker(tmp_path), runs, QUIET)
    before = len(list(runs.path.glob("*.json")))
    assert work(ToyWorker(tmp_path, passes=2), runs, QUIET) == before
    assert len(list(runs.path.glob("*.json"))) == 2 * before


def test_a_new_arm_leaves_the_others_as_they_are(tmp_path):
    runs = RunFolder(tmp_path / "runs")
    work(ToyWorker(tmp_path), runs, QUIET)
    more = ToyWorker(tmp_path, arms=["single", "mix", "wide", "mole", "mole_frozen"])
    work(more, runs, QUIET)
    assert {job.arm.name for job in more.jobs} == {"mole_frozen"}


def test_time_that_is_over_stops_before_a_run(tmp_path):
    worker = ToyWorker(tmp_path)
    assert work(worker, RunFolder(tmp_path / "runs"), QUIET, limit_minutes=1e-9) == 0
    assert report(worker.study, RunFolder(tmp_path / "runs"), QUIET) is None


class LoggedWorker(ToyWorker):
    """Writes down who does what, and takes its time over it."""

    def run(self, job):
        with (self.study.config.run.out / "log").open("a") as log:
            log.write(f"{os.getpid()} {self.study.name(job)}\n")
        time.sleep(0.03)
        return super().run(job)


def share(folder: Path) -> None:
    """One of several processes."""
    work(LoggedWorker(folder), RunFolder(folder / "runs"), QUIET)


def test_two_processes_share_the_work_and_do_nothing_twice(tmp_path):
    processes = [FORK.Process(target=share, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    workers, runs = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    study = Study(toy_config(tmp_path), FACTS)
    assert len(runs) == len(set(runs)) == study.size
    assert len(set(workers)) == 2
    assert not list((tmp_path / "runs").glob("*.lock"))
