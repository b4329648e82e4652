"""One trained arm, what was measured of it, and how the runner trains and keeps them.

N scored tokens, L routed layers.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from studies.runner import Job, PairedSeeds, RunFolder, digest, run_all


@dataclass(frozen=True)
class Arm:
    """`settings` are what the part's model is changed by; arms of one `family` differ in their load alone."""

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """Of every scored token: its loss, how many real experts it took, where it stands, how frequent it is."""

    loss_N: np.ndarray
    real_picks_NL: np.ndarray
    position_N: np.ndarray
    log_frequency_N: np.ndarray


@dataclass(frozen=True)
class Measured:
    """`figures` holds at least "loss", and "load", "variance" and "none" (share without an expert) over all tokens."""

    figures: dict[str, float]
    tokens: Tokens


class Study(Protocol):
    """One part: what its arms are, and how one of them is trained and measured."""

    part: str
    arms: Sequence[Arm]

    def recipe(self, arm: Arm, seed: int) -> dict[str, Any]:
        """All that a run's figures follow from, as JSON values; a run made by another recipe does not count."""

    def prepare(self) -> None:
        """Do, once, what all runs need, so that a run's time is its own."""

    def run(self, arm: Arm, seed: int) -> Measured:
        """Train the arm and measure it on held-out data."""


def plan_of(study: Study, seeds: int) -> PairedSeeds:
    """Every arm of the part with every seed."""
    return PairedSeeds(
        study.part, study.arms, seeds, lambda arm, seed: digest([study.recipe(arm, seed), arm.settings, seed])
    )


def run_part(study: Study, runs: RunFolder, seeds: int, console: Console, *, limit_minutes: float | None = None) -> int:
    """Runs what is not there yet; see `run_all`."""
    return run_all(
        plan_of(study, seeds), partial(_run, study), runs, console, describe=_describe, limit_minutes=limit_minutes
    )


def _run(study: Study, job: Job) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    study.prepare()
    clock = time.process_time()
    measured = study.run(job.arm, job.seed)
    record = {
        "part": study.part,
        "arm": asdict(job.arm),
        "seed": job.seed,
        "settings": study.recipe(job.arm, job.seed),
        "figures": measured.figures,
        "processor_seconds": round(time.process_time() - clock, 1),
    }
    return record, asdict(measured.tokens)


def _describe(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {record['figures'][name]:.4f}" for name in ("load", "loss", "right"))


def tokens_of(study: Study, job: Job, runs: RunFolder) -> Tokens:
    """The tokens of a finished run."""
    arrays = runs.arrays(plan_of(study, 0).name(job))
    return Tokens(**{each.name: arrays[each.name] for each in fields(Tokens)})
