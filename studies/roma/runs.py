"""One arm for one seed: its trials, the one validation chose, and what that does on test rows.

N rows, M width of an embedding, R length of a routing vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from mllm.alignment import (
    Aligner,
    AlignmentData,
    AlignSettings,
    Neighbours,
    align_routers,
    mixing,
    nearest,
    neighbours_mean,
    sample_vectors,
    score,
)
from mllm.alignment.report import consistency
from mllm.alignment.success import Scores
from mllm.alignment.vectors import vector_sizes
from studies.roma.arms import Arm
from studies.roma.lora import train_lora
from studies.runner import Job, PairedSeeds, RunFolder, digest, run_all

SCORED_AT_ONCE = 128  # rows


@dataclass(frozen=True)
class Task:
    """A model and its rows, numbered through. `family_N` names each row's; `held_out` are families not trained on.

    `embeddings_NM` are the base's, centred by the training rows; `succeeded_N` who is answered correctly before;
    `before` keeps routing vectors before anything is learned, by the layers looked at.
    """

    model: nn.Module
    data: AlignmentData
    train: Sequence[int]
    validation: Sequence[int]
    test: Sequence[int]
    family_N: Sequence[str]
    held_out: tuple[str, ...]
    embeddings_NM: Tensor
    succeeded_N: Tensor
    before: dict[tuple[str, ...], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """How long and how wide every arm of a part is aligned."""

    steps: int = 150
    batch_size: int = 32
    layers: int = 5
    neighbours: int = 3


class Part(Protocol):
    """Where tasks come from; `name` begins the names of its runs."""

    name: str
    sizes: Sizes

    def recipe(self) -> dict[str, Any]:
        """All that a run's figures follow from besides arm and seed, as JSON values."""

    def task(self, seed: int) -> Task:
        """The seed's model and rows; what is dear of it stays on disk, made once by whichever process comes first."""


@dataclass(frozen=True)
class Measured:
    """`right` and `loss` of every test row, and figures of the run."""

    figures: dict[str, float]
    trial: dict[str, float]
    scores: Scores


def run_arm(task: Task, arm: Arm, sizes: Sizes, seed: int) -> Measured:
    """The model is afterwards as it was before. Only the trial that validation chose is tested."""
    aligner = Aligner(task.model, _settings(arm, sizes, {}))
    neighbours = _neighbours(task, arm.pool or "true", sizes, seed)
    if arm.by_family:
        neighbours = _weighed_by_family(task, neighbours)
    before_NR = _vectors_before(task, aligner)
    best: tuple[float, dict[str, float], Learned] | None = None
    for trial in arm.trials or ({},):
        learned = _learn(task, arm, aligner, neighbours, sizes, seed, trial, before_NR)
        validated = score(task.model, task.data, task.validation, batch_size=SCORED_AT_ONCE, around=learned.around)
        loss = validated.loss_N.mean().item()
        learned.undo()
        if best is None or loss < best[0]:
            best = loss, trial, learned
    loss, trial, learned = best
    learned.redo()
    tested = score(task.model, task.data, task.test, batch_size=SCORED_AT_ONCE, around=learned.around)
    after_NR = before_NR if arm.name == "base" else _vectors(task, aligner)
    learned.undo()
    true = neighbours if arm.pool == "true" else _neighbours(task, "true", sizes, seed)
    figures = {f"{when}/{key}": value for when, table in (("before", before_NR), ("after", after_NR))
               for key, value in consistency(table, true, task.test).items()}  # fmt: skip
    figures |= {"validation_loss": loss, "weights": sum(p.numel() for p in aligner.trained().values())}
    return Measured(figures, trial, tested)


def _vectors_before(task: Task, aligner: Aligner) -> Tensor:
    """Routing before anything is learned: the same for all arms of a task that look at the same layers."""
    key = tuple(aligner.names)
    if key not in task.before:
        task.before[key] = _vectors(task, aligner)
    return task.before[key]


def _vectors(task: Task, aligner: Aligner) -> Tensor:
    """Routing of every row, 0 for those that nobody looks at."""
    rows = [*task.train, *task.test]
    vectors_MR = sample_vectors(task.model, task.data, aligner.layers, rows, batch_size=SCORED_AT_ONCE)
    return vectors_MR.new_zeros(len(task.data), vectors_MR.shape[1]).index_copy(0, torch.tensor(rows), vectors_MR)


def _neighbours(task: Task, pool: str, sizes: Sizes, seed: int) -> Neighbours:
    """Of all rows, among the training rows that the arm takes."""
    candidates_N = torch.zeros(len(task.embeddings_NM), dtype=torch.bool)
    candidates_N[list(task.train)] = True
    if pool != "any":
        candidates_N &= task.succeeded_N
    found = nearest(task.embeddings_NM, candidates_N=candidates_N, k=sizes.neighbours)
    return found.shuffled(candidates_N, torch.Generator().manual_seed(seed)) if pool == "random" else found


class Learned(NamedTuple):
    """A trial: what its scoring is done within, how to undo it, and how to have it again."""

    around: Callable[..., AbstractContextManager] | None = None
    undo: Callable[[], Any] = lambda: None
    redo: Callable[[], Any] = lambda: None


def _learn(
    task: Task, arm: Arm, aligner: Aligner, neighbours: Neighbours, sizes: Sizes, seed: int, trial: dict[str, float],
    before_NR: Tensor,
) -> Learned:  # fmt: skip
    """Trains the trial; the model holds it."""
    common = {"rows": task.train, "steps": sizes.steps, "batch_size": sizes.batch_size, "seed": seed}
    if arm.name == "base":
        return Learned()
    if arm.name == "mixing":
        targets_NR = neighbours_mean(neighbours, before_NR)
        return Learned(
            mixing(aligner.layers, targets_NR, vector_sizes(task.model, aligner.layers), alpha=trial["alpha"])
        )
    if arm.name == "lora":
        weights = sum(p.numel() for p in aligner.trained().values())
        lora = train_lora(task.model, task.data, aligner.layers, weights, lr=trial["lr"], **common)
        return Learned(undo=lora.remove, redo=lora.attach)

    def refreshed(_: Aligner, epoch: int) -> Neighbours:
        succeeded_N = task.succeeded_N.clone()
        succeeded_N[list(task.train)] = score(task.model, task.data, task.train, batch_size=SCORED_AT_ONCE).exact_N
        return _neighbours(replace(task, succeeded_N=succeeded_N), arm.pool, sizes, seed)

    refresh = refreshed if arm.refresh else None
    settings = _settings(arm, sizes, trial)
    align_routers(task.model, task.data, settings, neighbours=neighbours, lr=trial["lr"], refresh=refresh, **common)
    found = aligner.weights()
    return Learned(undo=lambda: aligner.set_weights(aligner.initial), redo=lambda: aligner.set_weights(found))


def _settings(arm: Arm, sizes: Sizes, trial: dict[str, float]) -> AlignSettings:
    return AlignSettings(**{"layers": sizes.layers, "weight": trial.get("weight", 1.0), **arm.settings})


def _weighed_by_family(task: Task, neighbours: Neighbours) -> Neighbours:
    """Rows weigh as much as training rows of their family fail, 1 on average over training rows."""
    families = np.array(task.family_N)
    train, failed = families[list(task.train)], ~task.succeeded_N[list(task.train)].numpy()
    shares = {family: failed[train == family].mean() for family in np.unique(train)}
    factors_N = torch.tensor([shares.get(family, 0.0) / max(failed.mean(), 1e-9) for family in families])
    return replace(neighbours, weights_NK=neighbours.weights_NK * factors_N[:, None].float())


# -- for the runner ----------------------------------------------------------------------------------------------------


def run_part(
    part: Part,
    arms: Sequence[Arm],
    runs: RunFolder,
    seeds: int,
    console: Console,
    *,
    limit_minutes: float | None = None,
) -> int:
    """Runs what is not there yet; see `run_all`."""
    task_of = lru_cache(maxsize=1)(part.task)  # seed by seed: one is looked at at a time

    def run(job: Job) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        task, clock = task_of(job.seed), time.process_time()
        measured = run_arm(task, job.arm, part.sizes, job.seed)
        families = np.array([task.family_N[row] for row in task.test])
        arrays = {
            "right": measured.scores.exact_N.numpy(),
            "family": families,
            "loss": measured.scores.loss_N.numpy().astype(np.float32),
            "is_held_out": np.isin(families, task.held_out),
        }
        record = {
            "part": part.name,
            "arm": asdict(job.arm),
            "seed": job.seed,
            "settings": part.recipe() | asdict(part.sizes),
            "trial": measured.trial,
            "figures": measured.figures,
            "processor_seconds": round(time.process_time() - clock, 1),
        }
        return record, arrays

    plan = PairedSeeds(part.name, arms, seeds, partial(recipe_of, part))
    return run_all(plan, run, runs, console, describe=_describe, limit_minutes=limit_minutes)


def _describe(record: dict[str, Any]) -> str:
    return f"validation loss {record['figures']['validation_loss']:.4f}, trial {record['trial']}"


def recipe_of(part: Part, arm: Arm, seed: int) -> str:
    """A digest of all that a run's figures follow from. Switches that are off count as not there: they came later."""
    settings = {key: value for key, value in asdict(arm).items() if value is not False}
    return digest([part.recipe(), asdict(part.sizes), settings, seed])


def finished(runs: RunFolder, part: str, arm: str, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The record and the rows' arrays of a run by any recipe; None where there is none.

    A report needs neither models nor data, from which a part's recipe would follow.
    """
    name = f"{part}-{arm}-s{seed}"
    record = runs.record(name)
    return None if record is None else (record, runs.arrays(name))
