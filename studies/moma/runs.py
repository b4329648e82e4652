"""One training of the study, and the plan of all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import nn

from mllm.moma import MomaForCausalLM
from mllm.moma.cost import head_flops, moma_cost
from mllm.moma.scoring import evaluating, evaluation_modes, held_out_losses
from mllm.moma.stream import PackedRows, pack
from studies.moma.arms import ARMS, DENSE, MAIN, SCALES, arm_model
from studies.runner import RunFolder, digest, locked, run_all
from train.moma.config import MomaModelSection, StreamSection
from train.moma.data import data_digest, held_out_documents, training_rows
from train.moma.model import build_processor

SWEEP_SEED = 1000
COUNTED_ROWS = 32
FEW_SCENES = 500


@dataclass(frozen=True)
class Run:
    """One training: an arm, a rate and a seed; `split` is what its curve is scored on."""

    arm: str
    rate: float
    seed: int
    split: Literal["val", "test"]

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.arm}-lr{self.rate:g}-s{self.seed}-{self.split}"


class Study:
    """A scale, its data, and the folder that keeps runs."""

    def __init__(
        self, scale_name: str, tokenizer: Path, out: Path, captions: Sequence[Path] = (), image_root: Path | None = None
    ) -> None:
        """Raises UserError for a folder without a tokenizer, and for a scale without pictures."""
        self.scale, self.folder = SCALES[scale_name], out / scale_name
        self.runs = RunFolder(self.folder / "runs")
        self.processor = build_processor(MomaModelSection(image_tokenizer=tokenizer))
        self.data = StreamSection(
            miniworld=self.scale.scenes,
            held_out=self.scale.held_out,
            length=self.scale.length,
            rows=self.scale.steps * self.scale.batch_rows,
            image_share=0.5,
            captions=list(captions),
            image_root=image_root,
            cache=Path("runs/moma_study/rows"),
        )
        self.data_digest = data_digest(self.data, self.processor)

    def prepare(self) -> None:
        """Rows of all splits, once, so that a run's time is its own."""
        self.rows = self._training_rows(self.data)
        self.scored = {split: self._held_out(split) for split in ("val", "test")}

    def few_rows(self, rows: int) -> PackedRows:
        """Rows of training as a measurement of speed needs them, of few pictures."""
        few = {"rows": rows, "miniworld": min(self.scale.scenes, FEW_SCENES)}
        return self._training_rows(self.data.model_copy(update=few))

    def _training_rows(self, data: StreamSection) -> PackedRows:
        with locked(data.cache / "rows.lock", wait=True):
            return training_rows(data, self.processor)

    def _held_out(self, split: Literal["val", "test"]) -> PackedRows:
        documents = held_out_documents(self.data, self.processor, split)
        return PackedRows(*(np.stack(column) for column in zip(*pack(documents, self.data.length), strict=True)))

    def record(self, run: Run) -> dict | None:
        """What was measured, if it was by this recipe."""
        return self.runs.record(run.name, self.recipe(run))

    def recipe(self, run: Run) -> str:
        """A short name of all that a run's figures follow from."""
        scale = asdict(self.scale)
        if run.split == "test":
            del scale["sweep_steps"]  # a test run is the same however its rate was found
        return digest([scale, ARMS[run.arm], asdict(run), self.data_digest])

    def rate_of(self, arm: str) -> float | None:
        """The rate with the lowest final causal loss on the val split; None until all were tried."""
        tried = {rate: self.record(Run(arm, rate, SWEEP_SEED, "val")) for rate in self.scale.rates}
        if not all(tried.values()):
            return None
        return min(tried, key=lambda rate: tried[rate]["curve"][-1]["losses"]["all"])


@dataclass(frozen=True)
class SweepThenSeeds:
    """The plan: every arm's rates on the val split, then paired seeds at the rate that was best, on the test split."""

    study: Study
    arms: Sequence[str]
    seeds: int
    main_seeds: int  # of dense and 4t4i

    @property
    def size(self) -> int:
        """Runs in all."""
        return len(self.arms) * len(self.study.scale.rates) + sum(self._seeds_of(arm) for arm in self.arms)

    def jobs(self, _: RunFolder) -> list[Run]:
        """Tests of an arm come once all its rates are tried."""
        sweep = [Run(arm, rate, SWEEP_SEED, "val") for arm in self.arms for rate in self.study.scale.rates]
        best = {arm: rate for arm in self.arms if (rate := self.study.rate_of(arm)) is not None}
        tests = [
            Run(arm, rate, seed, "test")
            for seed in range(max(self.seeds, self.main_seeds))
            for arm, rate in best.items()
            if seed < self._seeds_of(arm)
        ]
        return sweep + tests

    def name(self, run: Run) -> str:
        """Of its file."""
        return run.name

    def recipe(self, run: Run) -> str:
        """As the study has it."""
        return self.study.recipe(run)

    def _seeds_of(self, arm: str) -> int:
        return self.main_seeds if arm in (DENSE, MAIN) else self.seeds


def run_study(plan: SweepThenSeeds, console: Console, *, limit_minutes: float | None = None) -> int:
    """Trains and scores what is not there yet; see `run_all`."""
    study = plan.study

    def run(job: Run) -> tuple[dict[str, Any], None]:
        return {"run": asdict(job), **train_arm(study, job)}, None

    return run_all(plan, run, study.runs, console, describe=_describe, limit_minutes=limit_minutes)


def _describe(record: dict[str, Any]) -> str:
    return f"causal loss {record['curve'][-1]['losses']['all']:.4f}"


# -- training ----------------------------------------------------------------------------------------------------------


def train_arm(study: Study, run: Run) -> dict[str, Any]:
    """A plain loop on one device: {"curve", "final", "active", "flops_a_step", "parameters", "tokens_per_second"}.

    The same seed gives every arm the same rows in the same order. Compute is forward, times three, head included.
    """
    scale, device = study.scale, "cuda" if torch.cuda.is_available() else "cpu"
    steps = scale.steps if run.split == "test" else scale.sweep_steps
    torch.manual_seed(run.seed)
    model = arm_model(run.arm, scale, study.processor).to(device)
    order = study.rows.order(run.seed, 0)[: steps * scale.batch_rows].reshape(steps, scale.batch_rows)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / scale.warmup))
    marks = _marks(scale.warmup, steps, scale.points) if run.split == "test" else {steps}
    curve, seconds, flops = [], 0.0, 0
    for step, rows in enumerate(order, 1):
        began = clock()
        learn(model, study.rows.batch(rows.tolist()), optimizer)
        rate.step()
        seconds += clock() - began
        cost = moma_cost(model)
        flops += 3 * (cost.flops + head_flops(model))
        if step in marks:
            losses = held_out_losses(model, study.scored[run.split], study.processor)
            curve.append({"step": step, "flops": flops, "seconds": seconds, "losses": losses})
    final = _final(study, model, order) if run.split == "test" else {}
    return {
        "curve": curve,
        "final": final,
        "active": {mode: active_by(study, model, mode) for mode in final},
        "flops_a_step": flops / steps,
        "parameters": {"total": cost.total_parameters, "active": cost.active_parameters},
        "tokens_per_second": steps * scale.batch_rows * scale.length / seconds,
    }


def _marks(first: int, last: int, points: int) -> set[int]:
    """Steps at which a curve is scored, evenly in their logarithm."""
    return set(np.unique(np.geomspace(first, last, points).round().astype(int)).tolist())


def _final(study: Study, model: MomaForCausalLM, order: np.ndarray) -> dict[str, dict[str, float]]:
    """Losses of the finished model by every way that its experts can choose, auxiliary routers trained for it."""
    final = {mode: losses_by(study, model, mode) for mode in evaluation_modes(model)}
    if model.config.chooses_over_batch:
        train_auxiliary(study, model, order)
        final["aux"] = losses_by(study, model, "aux")
    return final


def learn(model: MomaForCausalLM, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One step."""
    model.train()
    loss = model(**{key: values.to(model.device) for key, values in batch.items()}).loss
    loss.backward()
    nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_auxiliary(study: Study, model: MomaForCausalLM, order: np.ndarray) -> None:
    """MoMa's second stage, on rows seen before."""
    model.begin_auxiliary_stage()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, fused=True)
    for rows in order[: study.scale.auxiliary_steps]:
        learn(model, study.rows.batch(rows.tolist()), optimizer)


def losses_by(study: Study, model: MomaForCausalLM, mode: str) -> dict[str, float]:
    """On test rows. Leaky figures depend on the batch: it is that of training."""
    rows = study.scored["test"]
    return held_out_losses(model, rows, study.processor, mode=mode, batch_size=study.scale.batch_rows)


@torch.no_grad()
def active_by(study: Study, model: MomaForCausalLM, mode: str) -> float:
    """Weights that a token meets on average where experts choose so; causal ways may take more than training did."""
    batch = study.scored["test"].batch(range(min(COUNTED_ROWS, len(study.scored["test"]))))
    with evaluating(model, mode):
        model(batch["input_ids"].to(model.device), position_ids=batch["position_ids"].to(model.device), use_cache=False)
    return moma_cost(model).active_parameters


def clock() -> float:
    """Seconds: the processor's on a CPU, which others' work stretches less, the wall's on a GPU."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
