"""Runs the jobs of a conflict study on its base and data."""

from typing import Any

import torch
from rich.console import Console

from mllm.build import fingerprint, load
from mllm.common.precision import find_device
from studies.conflict.config import ConflictConfig
from studies.conflict.data import StudyData, StudyRows, embed, read_rows
from studies.conflict.study import Job, Study
from studies.conflict.training import train_and_score
from studies.runner import RunFolder, run_all
from train.check import check_dtype
from train.parts import DTYPES


class Worker:
    """The base, read once, and the data, embedded when the first run is due."""

    def __init__(self, config: ConflictConfig) -> None:
        """Raises UserError for a base, rows or arms that cannot be used."""
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        rows = read_rows(config.data, with_twice=any(arm.trains == "twice" for arm in config.arms))
        device = find_device(config.model.device, key="model.device")
        check_dtype(config.model.dtype)
        self.base, self.processor = load(config.model.path, dtype=DTYPES[config.model.dtype], device=device)
        self.study = Study(config, rows.facts() | {"base": fingerprint(self.base, with_projector=True)})
        self.study.adapters  # noqa: B018
        self._rows: StudyRows = rows
        self._data: StudyData | None = None

    def run(self, job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
        """A record, and arrays by sample."""
        if self._data is None:
            self._data = embed(self.base, self.processor, self._rows)
        record, arrays = train_and_score(job, self.study, self.base, self._data)
        return {"arm": job.arm.name, "split": job.split, "rate": job.rate, "seed": job.seed} | record, arrays


def work(worker: Worker, runs: RunFolder, console: Console, *, limit_minutes: float | None = None) -> int:
    """Runs all that is due, or until time is over. Returns how many runs this process made."""
    return run_all(worker.study, worker.run, runs, console, describe=_describe, limit_minutes=limit_minutes)


def _describe(record: dict[str, Any]) -> str:
    return f"exact {100 * record['exact']:.1f} %, loss {record['loss']:.3f}"
