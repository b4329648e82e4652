"""Part A: sparse LoRA experts on the embedded base, frozen; the three domains of miniworld in their own conventions.

The experts are all that is trained (no LoRA on attention, no projector), of a rank at which they matter.
B batch, S sequence, T = B·S tokens, N scored tokens (those that an answer's tokens are predicted from), L routed
layers, V vocabulary.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from data_recipes.miniworld.__main__ import recipe_version, write
from mllm import load
from mllm.data.sources import Source
from mllm.data.template import IGNORED
from mllm.mole import MoleConfig, routing_context
from mllm.routing import RoutingStats
from studies.adamoe.runs import Arm, Measured, Tokens
from studies.finetune import CachedSet, Schedule, cache, finetune, study_precision
from studies.runner import locked
from train.config import OptimSection
from train.trainer import answer_losses

FRAME = {"r": 4, "lora_alpha": 8, "num_experts": 4, "gate": "softmax", "target_modules": [], "modules_to_save": []}
# AdaMoE's own pairs for four experts: 1.78, 1.45 and 1.23 real picks where routing is even.
NULLS = {"m5": {"top_k": 4, "num_null_experts": 5}, "m7": {"top_k": 4, "num_null_experts": 7}}
NULLS["m9"] = {"top_k": 4, "num_null_experts": 9}

ARMS = (
    # Renormalised, a lone pick weighs 1 and its router learns nothing; straight through it weighs 1 and does.
    Arm("top1", "top-1", {"top_k": 1, "gate": "straight_through"}),
    Arm("top2", "top-2", {"top_k": 2}),
    *(Arm(f"drop{percent}", "dropping", {"top_k": 2, "drop_share": percent / 100}) for percent in (15, 30, 45, 65)),
    *(Arm(f"null_{name}", "null", nulls) for name, nulls in NULLS.items()),
    *(Arm(f"shared_{name}", "shared null", nulls | {"null_logits": "shared"}) for name, nulls in NULLS.items()),
    # Of two picks the second is taken where the first holds less than this; so the load stays between 1 and 2.
    *(Arm(f"top_p{percent}", "top-p", {"top_k": 2, "top_p": percent / 100}) for percent in (45, 55, 75)),
    # AdaMoE's weights leave the null logits out, so that the task cannot teach them; straight through they are in.
    Arm("taught_m7", "null, straight through", NULLS["m7"] | {"gate": "straight_through"}),
    Arm(
        "frozen_m7",
        "null, frozen router",
        NULLS["m7"] | {"router": "frozen_random", "balance": "bias", "bias_update_rate": 3e-3},
    ),
)


@dataclass(frozen=True)
class AdapterStudy:
    """Sizes of part A; `scenes` a domain, two questions each. Pictures are drawn into `data`."""

    data: Path = Path("runs/adamoe_pareto")
    scenes: dict[str, int] = field(default_factory=lambda: {"train": 1000, "val": 0, "test": 200})
    steps: int = 80
    batch_size: int = 16
    lr: float = 1e-2  # of 3e-3, 1e-2 and 3e-2 the best for top-2 on validation scenes; the same for every arm

    part = "a"
    arms = ARMS

    def recipe(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Sizes, the frame all arms share, and the base and the pictures by their hashes."""
        sizes = {key: value for key, value in asdict(self).items() if key != "data"}
        return sizes | {"frame": FRAME, "base": self.base_hash, "drawn_by": recipe_version()}

    def prepare(self) -> None:
        """Draw the pictures and embed them."""
        self.prepared  # noqa: B018

    def run(self, arm: Arm, seed: int) -> Measured:
        """One adapter, trained and taken off again. Order of samples and first weights follow from the seed."""
        base, train, test, log_frequency_V = self.prepared
        schedule = Schedule(self.steps, self.batch_size, OptimSection(lr=self.lr), seed)
        model = finetune(base, MoleConfig(**FRAME | arm.settings), train, schedule)
        try:
            return measure(model, test, log_frequency_V)
        finally:
            model.unload()

    @cached_property
    def base_hash(self) -> str:
        """Of the embedded base's weights."""
        weights = files("mllm").joinpath("assets/miniworld/model.safetensors").read_bytes()
        return hashlib.sha256(weights).hexdigest()[:12]

    @cached_property
    def prepared(self) -> tuple[LlavaForConditionalGeneration, CachedSet, CachedSet, np.ndarray]:
        """The base, training and test samples with their pictures embedded, and log counts of training tokens."""
        with locked(self.data.with_suffix(".lock"), wait=True):
            folder = write(self.data, self.scenes)
        base, processor = load("miniworld", dtype=torch.bfloat16)
        train, test = (cache(base, processor, Source(folder / f"{split}.json")) for split in ("train", "test"))
        return base, train, test, log_frequencies(torch.cat([sample["input_ids"] for sample in train.samples]))


def log_frequencies(token_ids: torch.Tensor) -> np.ndarray:
    """[V] log(1 + count), up to the highest id of the vocabulary that occurs, and one more for all above."""
    return np.log1p(np.append(token_ids.bincount().numpy(), 0))


@torch.no_grad()
def measure(model: nn.Module, data: CachedSet, log_frequency_V: np.ndarray, *, batch_size: int = 64) -> Measured:
    """Answers scored as `studies.finetune.score_answers` does, and token by token what was routed."""
    context, stats, columns, exact = routing_context(model), RoutingStats(), [], []
    for start in range(0, len(data), batch_size):
        inputs, labels, domains = data.batch(range(start, min(start + batch_size, len(data))))
        context.set_domains(domains)
        with study_precision(model):
            answers = answer_losses(model, inputs | {"use_cache": False}, labels)
        loss_N, right_N = answers.loss_T, answers.is_right_T
        stats.update(context)
        row_N, place_N = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        tokens_B = row_N.bincount(minlength=len(labels))
        real_picks_LT = context.stack("is_real_TK").sum(-1)
        token_N = inputs["input_ids"][row_N, place_N].clamp(max=len(log_frequency_V) - 1)
        columns.append(
            Tokens(
                loss_N.numpy(),
                real_picks_LT[:, row_N * labels.shape[1] + place_N].T.to(torch.int8).numpy(),
                torch.cat([torch.arange(count) for count in tokens_B]).to(torch.int16).numpy(),
                log_frequency_V[token_N].astype(np.float32),
            )
        )
        exact.append(torch.zeros(len(labels)).index_add(0, row_N, right_N.float()) == tokens_B)
    figures = routing_figures(stats) | {"right": float(torch.cat(exact).float().mean())}
    tokens = joined(columns)
    return Measured(figures | {"loss": float(tokens.loss_N.mean())}, tokens)


def routing_figures(stats: RoutingStats) -> dict[str, float]:
    """Load and what goes with it, over all tokens but padding; means over layers."""
    summary = stats.summary()
    names = {"load": "load", "variance": "load_variance", "none": "empty_share", "entropy": "entropy"}
    figures = {name: summary[f"routing/{key}"] for name, key in names.items()}
    by_modality = {name: summary.get(f"routing/load/{name}") for name in ("text", "image")}
    return figures | {f"load_{name}": value for name, value in by_modality.items() if value is not None}


def joined(batches: list[Tokens]) -> Tokens:
    """The tokens of all batches."""
    return Tokens(
        *(np.concatenate(column) for column in zip(*(vars(batch).values() for batch in batches), strict=True))
    )
