"""One run: an arm trained on a frozen base, scored, and what it cost; the base is afterwards as it was.

N samples of the scored split.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from mllm.mole import MoleConfig, routing_context
from mllm.mole.cost import base_flops, cost
from mllm.routing import RoutingStats
from studies.conflict.arms import Arm, adapter_of
from studies.conflict.config import ConflictConfig
from studies.conflict.data import ScoredSet, StudyData
from studies.conflict.study import Job, Study
from studies.finetune import CachedSet, Schedule, finetune, optimise, score_answers


def train_and_score(
    job: Job, study: Study, base: LlavaForConditionalGeneration, data: StudyData
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One run's record, and arrays with a value a sample.

    The record holds `exact` and `loss` (means over domains), `cost`, `routing` (None where nothing is chosen),
    `seconds` of training, `peak_mib` of memory.
    """
    values, scored = study.adapters[job.arm.name], getattr(data, job.split)
    exact_N, loss_N = np.zeros(len(scored.cached), bool), np.zeros(len(scored.cached), np.float32)
    costs, seconds, trained = ScoringCosts(), 0.0, 0
    reset_peak_memory()
    for rows, times, places in parts(job.arm, data, scored):
        schedule = schedule_of(job, study.config, times * len(rows))
        began = time.perf_counter()
        with trained_model(base, adapter_of(job.arm, values), data.train, schedule, rows) as model:
            seconds += time.perf_counter() - began
            trained += sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            costs.model = model
            batch = study.config.run.eval_batch_size
            scores = score_answers(model, scored.cached.part(places), batch_size=batch, after_batch=costs)
        exact_N[places], loss_N[places] = scores.exact, scores.loss
    columns = scored.columns() | {"exact": exact_N, "loss": loss_N}
    record = {
        "exact": domain_mean(exact_N, columns["domain"]),
        "loss": domain_mean(loss_N, columns["domain"]),
        "cost": costs.cost() | {"trained_parameters": trained},
        "routing": costs.routing() if chooses(values) else None,
        "seconds": round(seconds, 2),
        "peak_mib": peak_memory(),
    }
    return record, columns


def parts(arm: Arm, data: StudyData, scored: ScoredSet) -> Iterator[tuple[list[int], int, list[int]]]:
    """(training rows, times each comes in a pass, places scored) of each model that the arm trains."""
    mix, everything = list(range(data.mixed)), list(range(len(scored.cached)))
    if arm.trains == "domain":
        for domain in sorted(set(scored.cached.domains)):
            rows = [row for row in mix if data.train.domains[row] == domain]
            yield rows, 1, scored.cached.rows_of([domain])
    elif arm.trains == "nothing":
        yield [], 0, everything
    elif arm.trains == "twice":
        yield list(range(len(data.train))), 2 * data.mixed // len(data.train), everything
    else:
        yield mix, 1, everything


def chooses(values: Mapping[str, Any] | None) -> bool:
    """Whether an adapter of these fields sends tokens different ways: not LoRA, nor all experts for all tokens."""
    if values is None or values["num_experts"] == 1:
        return False
    return bool(values.get("num_null_experts")) or values.get("top_k", 1) != values["num_experts"]


def schedule_of(job: Job, config: ConflictConfig, draws: int) -> Schedule:
    """Steps for so many samples a pass, to the nearest batch."""
    steps = max(1, round(draws * config.run.passes / config.run.batch_size))
    rates = config.optim.part_lr.model_copy(update={"router": job.lr * job.arm.router_rate})
    optim = config.optim.model_copy(update={"lr": job.lr, "part_lr": rates})
    return Schedule(steps, config.run.batch_size, optim, job.seed)


@contextmanager
def trained_model(
    base: LlavaForConditionalGeneration,
    adapter: MoleConfig | None,
    data: CachedSet,
    schedule: Schedule,
    rows: Sequence[int],
) -> Iterator[nn.Module]:
    """The trained model while the block runs; without an adapter the language model itself, put back afterwards.

    Without rows the base as it is.
    """
    if not rows:
        yield base.requires_grad_(False)
        return
    if adapter is not None:
        model = finetune(base, adapter, data, schedule, rows=rows)
        try:
            yield model
        finally:
            model.unload()
        return
    base.requires_grad_(False)
    weights = language_weights(base)
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.to(torch.float32, copy=True)
            weight.requires_grad_(True)
        yield optimise(base, data, schedule, rows=rows)
    finally:
        for weight, data_before in zip(weights, before, strict=True):
            weight.data = data_before
        base.requires_grad_(False)


def language_weights(base: LlavaForConditionalGeneration) -> list[nn.Parameter]:
    """Of the language model and its head, each once where the two share some."""
    modules = (base.get_decoder(), base.get_output_embeddings())
    return list(dict.fromkeys(weight for module in modules for weight in module.parameters()))


def domain_mean(value_N: np.ndarray, domain_N: np.ndarray) -> float:
    """The mean over domains of each domain's mean."""
    return float(np.mean([value_N[domain_N == domain].mean() for domain in np.unique(domain_N)]))


@dataclass
class ScoringCosts:
    """What scoring spends and routes, summed over batches. Call it after each, while its routing is still there."""

    model: nn.Module | None = None
    tokens: int = 0
    flops: float = 0.0
    needed_flops: float = 0.0
    active: float = 0.0  # parameters, times tokens
    stats: RoutingStats = field(default_factory=RoutingStats)

    def __call__(self, domains: list[str]) -> None:
        """After the forward of a batch with these domains."""
        context = routing_context(self.model)
        if context is None:
            total = sum(weight.numel() for weight in self.model.parameters())
            self._add(1, base_flops(self.model, 1), base_flops(self.model, 1), total)
            return
        spent = cost(self.model)
        others = spent.flops - spent.expert_flops
        self._add(spent.tokens, spent.flops, others + spent.needed_expert_flops, spent.active_parameters)
        self.stats.update(context, domains)

    def _add(self, tokens: int, flops: float, needed_flops: float, active: float) -> None:
        self.tokens += tokens
        self.flops += flops
        self.needed_flops += needed_flops
        self.active += active * tokens

    def cost(self) -> dict[str, float]:
        """Of a forward, by token, padding included: FLOPs computed, FLOPs the picks needed, parameters in use."""
        sums = {"flops": self.flops, "needed_flops": self.needed_flops, "active_parameters": self.active}
        return {name: value / self.tokens for name, value in sums.items()}

    def routing(self) -> dict[str, Any]:
        """Layers, and the figures of `RoutingStats.summary`."""
        return {"layers": self.stats.layers, "summary": self.stats.summary()}


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Start counting anew; where the system does not let us, a later peak is that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        CLEAR.write_text("5")


def peak_memory() -> float | None:
    """MiB: of the GPU, or of this process, base and embedded pictures included. None where the system does not say."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith("VmHWM")), None)
