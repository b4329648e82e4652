"""Router alignment (RoMA, 2511.07419): trains router matrices only, so that samples are routed like their neighbours.

    L = CE(answer) + λ · scale · Σ_i Σ_{j ∈ N(i)} W_ij ‖r_i - r_j‖²

`Aligner` is the model with this loss as its forward, for a loop of one's own or DeepSpeed's; `align_routers` is such a
loop. What the paper's released code gets wrong is a switch here (`targets="detached_both"`).

B batch, S sequence, T supervised tokens, R length of a routing vector, K neighbours, U distinct neighbours of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.alignment.data import AlignmentData
from mllm.alignment.dense import dense_gradient
from mllm.alignment.loss import REGULARISERS, TARGETS, contrast_loss, entropy_loss, initial_loss, neighbour_loss
from mllm.alignment.neighbours import Neighbours
from mllm.alignment.routes import (
    SPACES,
    TOKENS,
    chosen_tokens,
    freeze_all_but,
    prepare,
    routed_layers,
    routing_context,
    routing_vectors,
)
from mllm.alignment.tail import answer_logits, run
from mllm.alignment.vectors import sample_vectors, vector_sizes
from mllm.common.errors import UserError
from mllm.data.template import IGNORED

CALIBRATION_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """What is trained and by which loss.

    Args:
        layers: the last so many decoder layers with routers, or their numbers; see `routed_layers`.
        token: whose routing is r; see `chosen_tokens`.
        space: "probs", the full softmax, or "logits".
        regulariser: a name of `REGULARISERS`.
        weight: λ; 1 weighs as much as the answers' loss at the start.
        weight_warmup: share of the steps over which λ rises from 0.
        targets: which of r_i and r_j gets a gradient; a name of `TARGETS`.
        dense_gradient: whether experts not picked give the router a gradient too; see `mllm.alignment.dense`.
    """

    layers: int | tuple[int, ...] = 5
    token: str = "last"
    space: str = "probs"
    regulariser: str = "neighbours"
    weight: float = 1.0
    weight_warmup: float = 0.0
    targets: str = "live"
    dense_gradient: bool = False

    def __post_init__(self) -> None:
        known = {"token": TOKENS, "space": SPACES, "regulariser": REGULARISERS, "targets": TARGETS}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(choices)}.")
        if self.weight < 0 or not 0 <= self.weight_warmup <= 1:
            raise UserError(f"weight={self.weight} must not be negative, weight_warmup={self.weight_warmup} a share.")

    @property
    def needs_neighbours(self) -> bool:
        """Whether the loss reads neighbours at all."""
        return self.regulariser in ("neighbours", "contrast") and self.weight > 0


class NeighbourBatch(NamedTuple):
    """The distinct neighbours of a batch: what they read, or their vectors as they were; `places_BK` among them."""

    inputs: dict[str, Any] | None
    labels_US: Tensor | None
    vectors_UR: Tensor | None
    places_BK: Tensor
    weights_BK: Tensor


class AlignmentBatch(NamedTuple):
    """Rows to learn from; the sum of their answers' losses is divided by `answer_tokens`."""

    inputs: dict[str, Any]
    labels_BS: Tensor
    answer_tokens: float
    neighbours: NeighbourBatch | None


class AlignmentLoss(NamedTuple):
    """`loss` to learn by; its parts without weights, detached."""

    loss: Tensor
    answer_loss: Tensor
    regulariser: Tensor


@dataclass
class AlignmentBatches:
    """Batches of rows with their neighbours; `ids_NK` are numbers of rows of `data`. `table_NR`: of targets="table"."""

    data: AlignmentData
    neighbours: Neighbours | None = None
    table_NR: Tensor | None = None

    def batch(self, rows: Sequence[int], *, answer_tokens: float | None = None) -> AlignmentBatch:
        """`answer_tokens`: of the whole step, over micro-batches and ranks; None: these rows are the step."""
        inputs, labels_BS, _ = self.data.batch(rows)
        tokens = float((labels_BS[:, 1:] != IGNORED).sum()) if answer_tokens is None else answer_tokens
        return AlignmentBatch(inputs, labels_BS, tokens, None if self.neighbours is None else self._neighbours(rows))

    def _neighbours(self, rows: Sequence[int]) -> NeighbourBatch:
        ids_BK, weights_BK = self.neighbours.ids_NK[list(rows)], self.neighbours.weights_NK[list(rows)]
        distinct_U, places_BK = ids_BK.clamp(min=0).unique(return_inverse=True)
        if self.table_NR is not None:
            return NeighbourBatch(None, None, self.table_NR[distinct_U], places_BK, weights_BK)
        inputs, labels_US, _ = self.data.batch(distinct_U.tolist())
        return NeighbourBatch(inputs, labels_US, None, places_BK, weights_BK)


class Aligner(nn.Module):
    """A model of which only some routers learn, and whose forward is the alignment loss.

    It stays in evaluation mode: everything else is frozen, so there is nothing to drop out, and a router's jitter would
    be noise in r. Native mixtures of experts are made to record their routing.

    Attributes: `layers` trained, `scale` of the regulariser (1 until `calibrate`), `progress` in [0, 1] for λ's rise.
    """

    def __init__(self, model: nn.Module, settings: AlignSettings) -> None:
        """Raises UserError for a model without routers that learn, or a loss that could not reach them."""
        super().__init__()
        self.model, self.settings = prepare(model), settings
        self.layers = routed_layers(model, settings.layers)
        self.names = [layer.name for layer in self.layers]
        freeze_all_but(model, self.layers)
        self.initial = self.weights()
        self.scale, self.progress = 1.0, 1.0
        _check_gate(self.layers, settings)
        self.eval()

    def train(self, mode: bool = True) -> Aligner:
        """Always evaluation mode, also when an engine asks for training."""
        return super().train(False)

    def trained(self) -> dict[str, nn.Parameter]:
        """What learns, as "layer.name"."""
        return {f"{layer.name}.{name}": p for layer in self.layers for name, p in layer.parameters().items()}

    def weights(self) -> dict[str, Tensor]:
        """A copy of what learns, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trained().items()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Put these in the routers, such as `initial`."""
        for name, parameter in self.trained().items():
            parameter.copy_(weights[name])

    def forward(self, batch: AlignmentBatch) -> AlignmentLoss:
        """The loss of a batch; the regulariser is that of the batch's mean row."""
        settings = self.settings
        with dense_gradient(self.model, self.layers) if settings.dense_gradient else nullcontext():
            logits_TV, targets_T, _ = answer_logits(self.model, batch.inputs, batch.labels_BS)
        answer_loss = F.cross_entropy(logits_TV, targets_T, reduction="sum") / batch.answer_tokens
        if settings.regulariser == "none" or settings.weight == 0:
            return AlignmentLoss(answer_loss, answer_loss.detach(), torch.zeros_like(answer_loss))
        regulariser = self._regulariser(batch)
        rise = min(1.0, self.progress / settings.weight_warmup) if settings.weight_warmup else 1.0
        loss = answer_loss + settings.weight * rise * self.scale * regulariser
        return AlignmentLoss(loss, answer_loss.detach(), regulariser.detach())

    def _regulariser(self, batch: AlignmentBatch) -> Tensor:
        """Of the batch whose forward was the last one."""
        if self.settings.regulariser == "initial":
            trained = self.trained()
            return initial_loss(list(trained.values()), [self.initial[n].to(p.device) for n, p in trained.items()])
        if self.settings.regulariser == "entropy":
            return entropy_loss(
                self._vectors(batch.inputs, batch.labels_BS, "probs"), vector_sizes(self.model, self.layers)
            )
        r_BR = self._vectors(batch.inputs, batch.labels_BS)
        r_UR = self._neighbour_vectors(batch.neighbours).to(r_BR.device)
        if self.settings.targets == "detached_both":
            r_BR = r_BR.detach()
        places_BK, weights_BK = (each.to(r_BR.device) for each in batch.neighbours[-2:])
        measure = contrast_loss if self.settings.regulariser == "contrast" else neighbour_loss
        return measure(r_BR=r_BR, r_BKR=r_UR[places_BK], weights_BK=weights_BK)

    def _vectors(self, inputs: dict[str, Any], labels_BS: Tensor, space: str | None = None) -> Tensor:
        context = routing_context(self.model)
        weights_BS = chosen_tokens(labels_BS, inputs["attention_mask"], self.settings.token)
        weights_BS = weights_BS.to(context.sample_T.device)
        return routing_vectors(context, self.names, weights_BS, space=space or self.settings.space)

    def _neighbour_vectors(self, neighbours: NeighbourBatch) -> Tensor:
        if neighbours.vectors_UR is not None:
            return neighbours.vectors_UR
        with nullcontext() if self.settings.targets == "live" else torch.no_grad():
            run(self.model, neighbours.inputs, None)
            return self._vectors(neighbours.inputs, neighbours.labels_US)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[AlignmentBatch]) -> float:
        """Sets `scale` so that, over these batches and at the present weights, λ = 1 weighs as much as CE.

        The distance from the initial routers is 0 then and counts in units of their own length; its scale is CE.
        Raises UserError where the regulariser is 0 and could never weigh anything.
        """
        losses = [self(batch) for batch in batches]
        answers, regulariser = (sum(getattr(each, name).item() for each in losses) / len(losses)
                                for name in ("answer_loss", "regulariser"))  # fmt: skip
        if self.settings.regulariser not in ("none", "initial") and self.settings.weight > 0:
            if regulariser < 1e-12:
                raise UserError("The regulariser is 0 at the start: neighbours are routed exactly alike already.")
            self.scale = answers / regulariser
        else:
            self.scale = answers
        return self.scale


def _check_gate(layers: Sequence[Any], settings: AlignSettings) -> None:
    choice = getattr(layers[0].router, "choice", None)
    is_deaf = choice is not None and choice.gate == "none" and not settings.dense_gradient
    if is_deaf and (settings.regulariser == "none" or settings.weight == 0):
        raise UserError(
            "The adapter's gate is 'none', so its routers get no gradient from the answers, and there is no other loss."
            " Set a regulariser, or dense_gradient: true."
        )


# -- a loop ------------------------------------------------------------------------------------------------------------


def row_order(rows: Sequence[int], steps: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """The rows of each step: shuffled passes, cut into batches. A pure function of its arguments."""
    draws, rng = steps * batch_size, np.random.default_rng(seed)
    passes = [rng.permutation(rows) for _ in range(-(-draws // len(rows)))]
    return iter(np.concatenate(passes)[:draws].reshape(steps, batch_size).tolist())


def align_routers(
    model: nn.Module,
    data: AlignmentData,
    settings: AlignSettings,
    *,
    neighbours: Neighbours | None = None,
    rows: Sequence[int] | None = None,
    steps: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    refresh: Callable[[Aligner, int], Neighbours] | None = None,
    on_step: Callable[[int, AlignmentLoss], None] | None = None,
) -> Aligner:
    """Aligns a model's routers in place: a MOLE adapter's, or those of a native mixture of experts.

    Args:
        data: rows, whole or cached (`CachedStates`); `neighbours` go by its row numbers.
        rows: those to learn from; None: all.
        lr: of AdamW, constant after one tenth of the steps.
        refresh: called when a new epoch begins, with its number from 1 on; returns the neighbours from then on (such as
            those among what is answered correctly now). Only the neighbours move: embeddings are the base's.

    Returns:
        The aligner; `aligner.initial` and `aligner.weights()` are the routers before and after.

    Raises:
        UserError: as `Aligner`; or the loss needs neighbours and there are none.
    """
    if settings.needs_neighbours and neighbours is None:
        raise UserError("regulariser 'neighbours' needs neighbours: give those that mllm.alignment.nearest found.")
    aligner = Aligner(model, settings)
    rows = list(range(len(data)) if rows is None else rows)
    source = AlignmentBatches(data, neighbours if settings.needs_neighbours else None)
    first = row_order(rows, min(steps, CALIBRATION_BATCHES), batch_size, seed)
    aligner.calibrate(source.batch(batch) for batch in first)
    optimizer = torch.optim.AdamW(aligner.trained().values(), lr=lr, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, steps // 10)))
    per_epoch = -(-len(rows) // batch_size)
    for step, batch in enumerate(row_order(rows, steps, batch_size, seed)):
        if step % per_epoch == 0:
            begin_epoch(aligner, source, step // per_epoch, refresh)
        aligner.progress = step / steps
        losses = aligner(source.batch(batch))
        losses.loss.backward()
        nn.utils.clip_grad_norm_(aligner.trained().values(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step, losses)
    return aligner


def begin_epoch(
    aligner: Aligner, source: AlignmentBatches, epoch: int, refresh: Callable[[Aligner, int], Neighbours] | None = None
) -> None:
    """Neighbours anew where asked for, and with targets="table" the vectors as they are now."""
    if epoch and refresh is not None and source.neighbours is not None:
        source.neighbours = refresh(aligner, epoch)
    if aligner.settings.targets == "table" and source.neighbours is not None:
        source.table_NR = sample_vectors(
            aligner.model, source.data, aligner.layers, token=aligner.settings.token, space=aligner.settings.space
        )
