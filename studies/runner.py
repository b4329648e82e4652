"""What every study is run by: arms and seeds as jobs, done once, by as many processes as one likes, and kept.

A study says which jobs there are (`Plan`) and how one is run; `run_all` runs what is not there yet. A finished run is
`<name>.json` beside `<name>.npz`; it is there whole or not at all. Who works on a run holds the lock of
`<name>.lock`, which the system lets go when the process ends, however it ends.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mllm.common import digests
from mllm.common.provenance import provenance

RESULTS = Path(__file__).parent / "results"
POLL_SECONDS = 1.0  # between two looks at what another process has finished

Record = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


def digest(values: Any) -> str:
    """The name of a run's settings. Kept runs are found by it: twelve digits, as they have always been."""
    return digests.digest(values, 12, ensure_ascii=True)


@contextmanager
def locked(lock: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds the lock file; held until the block ends. With `wait` it always does."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@dataclass(frozen=True)
class RunFolder:
    """Records (JSON values) with arrays, by name."""

    path: Path

    def record(self, name: str, recipe: Any = None) -> Record | None:
        """The record of a run; None where it was not finished, or not by this recipe, if one is given."""
        path = self.path / f"{name}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        same = recipe is None or (record is not None and record["recipe"] == json.loads(json.dumps(recipe)))
        return record if same else None

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a finished run."""
        with np.load(self.path / f"{name}.npz") as arrays:
            return dict(arrays)

    def write(self, name: str, record: Record, arrays: Arrays | None = None) -> None:
        """Writes a run, whole or not at all: the record comes last, and by renaming."""
        self.path.mkdir(parents=True, exist_ok=True)
        if arrays:
            np.savez_compressed(self.path / f"{name}.npz", **arrays)
        draft = self.path / f"{name}.part"
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.path / f"{name}.json")

    @contextmanager
    def claim(self, name: str, recipe: Any) -> Iterator[bool]:
        """Whether the run is this process's to do: it is not finished, and nobody else is at it.

        The lock file is removed once the run is there: a process that still opens it finds the run finished.
        """
        lock = self.path / f"{name}.lock"
        with locked(lock) as mine:
            yield mine and self.record(name, recipe) is None
            if mine and self.record(name, recipe) is not None:
                lock.unlink(missing_ok=True)


JobT = TypeVar("JobT", bound=Hashable)


class Plan(Protocol[JobT]):
    """Which jobs a study has."""

    @property
    def size(self) -> int:
        """Jobs in all."""

    def jobs(self, runs: RunFolder) -> Iterable[JobT]:
        """What can be run now, finished or not, in the order it should be: what is there must be paired at any time.

        Finished runs may open new jobs, as those of a sweep open those at the rate it chose.
        """

    def name(self, job: JobT) -> str:
        """Of the job's files."""

    def recipe(self, job: JobT) -> Any:
        """All that the job's figures follow from, or a digest of it, as JSON values."""


@dataclass(frozen=True)
class Job:
    """An arm, trained and measured with one seed; `arm` is a dataclass with a `name`."""

    arm: Any
    seed: int


@dataclass(frozen=True)
class PairedSeeds:
    """The plan of a study without a sweep: every arm with every seed, seed by seed. Seeds count from 0."""

    part: str  # begins the names of its runs
    arms: Sequence[Any]
    seeds: int
    recipe_of: Callable[[Any, int], str]  # a digest of all that a run of this arm and seed follows from

    @property
    def size(self) -> int:
        """Jobs in all."""
        return len(self.arms) * self.seeds

    def jobs(self, _: RunFolder) -> list[Job]:
        """All of them: none waits for another."""
        return [Job(arm, seed) for seed in range(self.seeds) for arm in self.arms]

    def name(self, job: Job) -> str:
        """`<part>-<arm>-s<seed>`."""
        return f"{self.part}-{job.arm.name}-s{job.seed}"

    def recipe(self, job: Job) -> str:
        """As the study has it."""
        return self.recipe_of(job.arm, job.seed)

    def complete_seeds(self, runs: RunFolder) -> list[int]:
        """The seeds of which every arm is there."""
        missing = {job.seed for job in self.jobs(runs) if record_of(self, job, runs) is None}
        return [seed for seed in range(self.seeds) if seed not in missing]


def record_of(plan: Plan[JobT], job: JobT, runs: RunFolder) -> Record | None:
    """The record of a finished job; None where it is not finished, or was by another recipe."""
    return runs.record(plan.name(job), plan.recipe(job))


def run_all(
    plan: Plan[JobT],
    run: Callable[[JobT], tuple[Record, Arrays | None]],
    runs: RunFolder,
    console: Console,
    *,
    describe: Callable[[Record], str],
    limit_minutes: float | None = None,
) -> int:
    """Runs all jobs that are left, or until the next would end later than `limit_minutes`. Returns how many it ran.

    `run` returns figures and arrays; recipe, commit and device are added here. `describe` says figures in a few words.
    A job that another process is at is waited for, or taken over when that process ends without it.
    """
    began, ran, seconds, made = time.monotonic(), 0, 0.0, provenance()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    with Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=1800) as bar:
        task = bar.add_task("", total=plan.size, rate="")
        while True:
            jobs = list(plan.jobs(runs))
            due = [job for job in jobs if record_of(plan, job, runs) is None]
            left, mean = plan.size - len(jobs) + len(due), seconds / max(ran, 1)
            bar.update(task, completed=plan.size - left, rate=f"{mean:.1f} s a run" if ran else "")
            if not due:
                return ran
            if limit_minutes is not None and time.monotonic() - began + mean > 60 * limit_minutes:
                console.print(f"Time is over with {left} runs left; the same command goes on with them.")
                return ran
            started = time.monotonic()
            with _first_free(plan, due, runs) as job:
                if job is not None:
                    name = plan.name(job)
                    bar.update(task, description=name)
                    figures, arrays = run(job)
                    runs.write(name, figures | {"recipe": plan.recipe(job), "made": made}, arrays)
            if job is None:
                bar.update(task, description="waiting for another process")
                time.sleep(POLL_SECONDS)
                continue
            ran, seconds = ran + 1, seconds + time.monotonic() - started
            minutes = (left - 1) * seconds / ran / 60
            console.print(f"{name}: {describe(figures)}; {left - 1} left, {minutes:.0f} min", highlight=False)


@contextmanager
def _first_free(plan: Plan[JobT], due: Iterable[JobT], runs: RunFolder) -> Iterator[JobT | None]:
    """Claims the first job that nobody is at, while the block runs; None where others are at all of them."""
    for job in due:
        with runs.claim(plan.name(job), plan.recipe(job)) as mine:
            if mine:
                yield job
                return
    yield None
