"""Carries out what is due, run by run; several processes may do so on one folder and share the work."""

import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mllm.build import fingerprint, load
from mllm.provenance import provenance
from train.conflict.config import ConflictConfig
from train.conflict.data import StudyData, StudyRows, embed, read_rows
from train.conflict.study import Job, Study
from train.conflict.training import carry_out
from train.kept import KeptRuns
from train.parts import DTYPES

PATIENCE = 1.0  # seconds between two looks at what another process has finished


class Worker:
    """The base, read once, and the data, embedded when the first run is due."""

    def __init__(self, config: ConflictConfig) -> None:
        """Raises UserError for a base, rows or arms that cannot be used."""
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        rows = read_rows(config.data, with_twice=any(arm.trains == "twice" for arm in config.arms))
        device = config.model.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.base, self.processor = load(config.model.path, dtype=DTYPES[config.model.dtype], device=device)
        self.study = Study(config, rows.facts() | {"base": fingerprint(self.base, with_projector=True)})
        self.study.adapters  # noqa: B018
        self._made = provenance()
        self._rows: StudyRows = rows
        self._data: StudyData | None = None

    def run(self, job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
        """A record, and arrays by sample."""
        if self._data is None:
            self._data = embed(self.base, self.processor, self._rows)
        record, arrays = carry_out(job, self.study, self.base, self._data)
        about = {"arm": job.arm.name, "split": job.split, "rate": job.rate, "seed": job.seed}
        return about | record | {"recipe": self.study.recipe(job), "made": self._made}, arrays


def work(worker: Worker, kept: KeptRuns, console: Console, *, limit_minutes: float | None = None) -> int:
    """Runs all that is due, or until time is over. Returns how many runs this process made.

    A run that another process is at is waited for, or taken over when that process ends without it.
    """
    study, began, made, seconds = worker.study, time.monotonic(), 0, 0.0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    with Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=1800) as bar:
        task = bar.add_task("", total=study.size, completed=study.finished(kept), rate="")
        while due := study.due(kept):
            bar.update(task, completed=study.finished(kept))
            if limit_minutes and time.monotonic() - began + seconds / max(made, 1) > 60 * limit_minutes:
                left = study.size - study.finished(kept)
                console.print(f"Time is over with {left} runs left; the same command goes on with them.")
                break
            started = time.monotonic()
            job = _run_one(worker, due, kept, lambda said: bar.update(task, description=said))
            if job is None:
                bar.update(task, description="waiting for another process")
                time.sleep(PATIENCE)
                continue
            made, seconds = made + 1, seconds + time.monotonic() - started
            bar.update(task, completed=study.finished(kept), rate=f"{seconds / made:.1f} s a run")
            _tell(kept.read(study.name(job)), console, left=study.size - study.finished(kept), rate=seconds / made)
    return made


def _run_one(worker: Worker, due: list[Job], kept: KeptRuns, say: Any) -> Job | None:
    """The first run that nobody is at; None where others are at all of them."""
    for job in due:
        name = worker.study.name(job)
        with kept.claim(name) as mine:
            if mine:
                say(f"{job.arm.name}, {job.split}, lr {job.lr:g}, seed {job.seed}")
                kept.keep(name, *worker.run(job))
                return job
    return None


def _tell(record: dict[str, Any], console: Console, *, left: int, rate: float) -> None:
    console.print(
        f"{record['arm']} {record['split']} lr {record['recipe']['lr']:g} seed {record['seed']}: "
        f"exact {100 * record['exact']:.1f} %, loss {record['loss']:.3f}; {left} left, {left * rate / 60:.0f} min",
        highlight=False,
    )
