"""What a study has to run, in which order, and by which recipe each run is made."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mllm.mole import start
from studies.conflict.arms import Arm, adapter_of, adapter_values
from studies.conflict.config import ConflictConfig
from studies.runner import RunFolder, digest, record_of
from train.parts import RESERVED

STARTS = {"rows": start.ROWS_OF_A_DOMAIN, "shrinkage": start.SHRINKAGE, "spread": start.LOGIT_SPREAD}
FIRST_TUNE_SEED = 1000  # far from the seeds that are scored on test


@dataclass(frozen=True)
class Job:
    """One training of an arm (of `single`, one a domain), scored on `val` or `test`."""

    arm: Arm
    split: Literal["val", "test"]
    rate: float  # of the grid, before the arm's own factor
    seed: int

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.rate * self.arm.rate


@dataclass(frozen=True)
class Study:
    """A config and the facts its runs' recipes need: of the base ("base") and of the data (`StudyRows.facts`)."""

    config: ConflictConfig
    facts: dict[str, Any]

    @cached_property
    def adapters(self) -> dict[str, dict[str, Any] | None]:
        """Arm -> its fields of MoleConfig. Raises UserError naming an arm whose fields do not go together."""
        frame = self.config.adapter.model_dump()
        values = {arm.name: adapter_values(arm, frame, self.facts["domains"]) for arm in self.config.arms}
        for arm in self.config.arms:
            adapter_of(arm, values[arm.name])
        return values

    def recipe(self, job: Job) -> dict[str, Any]:
        """All that a run's scores follow from."""
        run, data = self.config.run, self.facts["data"]
        recipe = {
            "base": self.facts["base"],
            "dtype": self.config.model.dtype,
            "adapter": self._whole_adapter(job.arm),
            "trains": job.arm.trains,
            "rows": data["train"],
            "split": job.split,
            "scored": data[job.split],
            "optim": self.config.optim.model_dump(exclude={"lr"}),
            "batch_size": run.batch_size,
            "passes": run.passes,
            "lr": job.lr,
            "router_lr": job.lr * job.arm.router_rate,
            "seed": job.seed,
        }
        return recipe | ({"twice": self.facts["data_twice"]} if job.arm.trains == "twice" else {})

    def _whole_adapter(self, arm: Arm) -> dict[str, Any] | None:
        """Every field of the arm's MoleConfig and how routers start: another default is another recipe."""
        adapter = adapter_of(arm, self.adapters[arm.name])
        if adapter is None:
            return None
        fields = {key: value for key, value in adapter.to_dict().items() if key not in RESERVED}
        return fields | ({"start": STARTS} if adapter.starts_from_pictures else {})

    def name(self, job: Job) -> str:
        """Readable, and another one for another recipe."""
        return f"{job.arm.name}-{job.split}-lr{job.lr:g}-s{job.seed}-{digest(self.recipe(job))}"

    def tuning(self, arm: Arm) -> list[Job]:
        """The trainings that choose the arm's rate; none where there is nothing to choose."""
        run, chooses = self.config.run, len(self.config.run.lrs) > 1 and arm.trains != "nothing"
        seeds = range(FIRST_TUNE_SEED, FIRST_TUNE_SEED + run.tune_seeds) if chooses else ()
        return [Job(arm, "val", rate, seed) for seed in seeds for rate in run.lrs]

    def tuned(self, arm: Arm, runs: RunFolder) -> dict[float, tuple[float, float]] | None:
        """Rate -> (exact share, loss) on validation, means over domains and seeds; None before all runs are there."""
        records = {job: record_of(self, job, runs) for job in self.tuning(arm)}
        if None in records.values():
            return None
        by_rate: dict[float, list[tuple[float, float]]] = {}
        for job, record in records.items():
            by_rate.setdefault(job.rate, []).append((record["exact"], record["loss"]))
        return {rate: tuple(np.mean(figures, axis=0).tolist()) for rate, figures in by_rate.items()}

    def chosen_rate(self, arm: Arm, runs: RunFolder) -> float | None:
        """The best of the grid by exact share, ties by loss; None while that is not known."""
        if not self.tuning(arm):
            return self.config.run.lrs[0]
        tuned = self.tuned(arm, runs)
        return tuned and min(tuned, key=lambda rate: (-tuned[rate][0], tuned[rate][1]))

    def finals(self, arm: Arm, runs: RunFolder) -> list[Job]:
        """The trainings that are scored on test; none while the arm's rate is not known."""
        rate = self.chosen_rate(arm, runs)
        return [] if rate is None else self.finals_at(rate, arm)

    def finals_at(self, rate: float, arm: Arm) -> list[Job]:
        """The same at a rate; none for an arm that validation alone looks at."""
        seeds = 0 if arm.name in self.config.only_tuned else self.config.run.seeds
        return [Job(arm, "test", rate, seed) for seed in range(seeds)]

    def jobs(self, runs: RunFolder) -> Iterator[Job]:
        """What can be run now, finished or not: rates first, then seed by seed, so that what is there is paired."""
        arms = self.config.arms
        yield from sorted((job for arm in arms for job in self.tuning(arm)), key=lambda job: job.seed)
        yield from sorted((job for arm in arms for job in self.finals(arm, runs)), key=lambda job: job.seed)

    @property
    def size(self) -> int:
        """Runs in all."""
        return sum(len(self.tuning(arm)) + len(self.finals_at(0.0, arm)) for arm in self.config.arms)
