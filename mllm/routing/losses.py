"""Losses on routings: pure functions of stacked tensors.

L routed layers, T tokens, X experts (null experts included), P populations (tokens that choose among the same experts:
one without groups, one a modality with them), C cells that tokens are pooled in.
Every token that is not padding counts, prompt and picture tokens as much as answers, the same way in every function;
`is_counted_T` says which. Picks f carry no gradient; probabilities do.

Every balance loss is Σ_x (f_x / τ_x) · P_x, f the share of picks, P the mean probability, τ the target share, averaged
over layers and, by their tokens, over cells. With an even target τ = 1/X this is Switch's X · Σ f P. It is 1 when
routing is on target, whatever L, X, K and τ, so that one weight means the same for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mllm.routing.layout import ExpertLayout


@dataclass(frozen=True)
class Target:
    """What balance aims at.

    `share_PX` is τ, 0 for experts a population may not take. The null experts of one set (see ExpertLayout.null_sets)
    stand for the same nothing: with f averaged over the set the loss fixes their sum only (AdaMoE, 2406.13233, Eq. 7,
    with f over K); an empty `null_sets` balances them one by one, as its released Mixtral code does.
    """

    share_PX: Tensor
    null_sets: tuple[slice, ...] = ()

    @classmethod
    def of(cls, layout: ExpertLayout, real_share: float | None = None, null_balance: str = "averaged") -> Target:
        """From the fields of MoleConfig."""
        null_sets = tuple(layout.null_sets) if null_balance == "averaged" else ()
        return cls(layout.target_PX(real_share), null_sets)

    def pressure_PX(self, counts_PX: Tensor) -> Tensor:
        """f / τ from pick counts [..., P, X]: 1 on target, 0 for experts a population may not take."""
        target_PX = self.share_PX.to(counts_PX)
        share_PX = counts_PX / counts_PX.sum(-1, keepdim=True).clamp(min=1)
        pressure_PX = share_PX / target_PX.where(target_PX > 0, 1)
        for null_set in self.null_sets:
            pressure_PX[..., null_set] = pressure_PX[..., null_set].mean(-1, keepdim=True)
        return pressure_PX


class BalanceWindow:
    """Pick counts of one optimizer step so far: all its micro-batches, all ranks (2501.11873, section 3.2).

    Balance within a micro-batch forbids specialisation when the micro-batch holds one domain; over the global batch it
    does not. The counts grow from micro-batch to micro-batch, so the last one sees the whole step.
    """

    def __init__(self) -> None:
        self.counts_LPX: Tensor | None = None

    def add(self, counts_LPX: Tensor) -> Tensor:
        """Take in the counts of a micro-batch, summed over ranks already; returns those of the step so far."""
        self.counts_LPX = counts_LPX if self.counts_LPX is None else self.counts_LPX + counts_LPX
        return self.counts_LPX

    def reset(self) -> None:
        """A new optimizer step begins."""
        self.counts_LPX = None


def pool(values_LTX: Tensor, cell_T: Tensor, num_cells: int, is_counted_T: Tensor) -> Tensor:
    """[L, C, X] sums over the counted tokens of each cell."""
    sums_LCX = values_LTX.new_zeros(len(values_LTX), num_cells, values_LTX.shape[-1])
    return sums_LCX.index_add(1, cell_T, values_LTX * is_counted_T[:, None])


def tokens_of(cell_T: Tensor, num_cells: int, is_counted_T: Tensor) -> Tensor:
    """fp32 [C] counted tokens of each cell."""
    return torch.zeros(num_cells, device=cell_T.device).index_add(0, cell_T, is_counted_T.float())


def balance_loss_layer(
    *,
    router_probs_LTX: Tensor,
    picks_LTX: Tensor,
    is_counted_T: Tensor,
    sample_T: Tensor,
    population_T: Tensor,
    target: Target,
) -> Tensor:
    """f and P over this rank's batch, layer by layer: Switch Transformer, 2101.03961, Eq. 4.

    picks_LTX is 1 where the token took the expert; population_T [T] int64 the row of `target` it belongs to.
    `sample_T` is not used: all balance losses are called alike.
    """
    num_populations = len(target.share_PX)
    tokens_P = tokens_of(population_T, num_populations, is_counted_T)
    counts_LPX = pool(picks_LTX, population_T, num_populations, is_counted_T)
    probs_LPX = pool(router_probs_LTX, population_T, num_populations, is_counted_T)
    return (target.pressure_PX(counts_LPX) * probs_LPX).sum((1, 2)).mean() / tokens_P.sum().clamp(min=1)


def balance_loss_global_batch(
    *,
    router_probs_LTX: Tensor,
    picks_LTX: Tensor,
    is_counted_T: Tensor,
    sample_T: Tensor,
    population_T: Tensor,
    target: Target,
    window: BalanceWindow | None = None,
) -> Tensor:
    """The layer loss with f counted over all ranks and, given a window, over the optimizer step so far (2501.11873).

    f is all-reduced; it carries no gradient, so a plain all_reduce is enough. P is this rank's sum over the token count
    of all ranks, times the number of ranks: averaged over ranks, as data parallelism averages gradients, value and
    gradient equal those of the joined batch also when ranks hold different numbers of tokens. Over a window P stays the
    micro-batch's own, so micro-batches count alike whatever their length. Without
    torch.distributed and window it is `balance_loss_layer`. All ranks must call it together. `sample_T` is not used.
    """
    num_populations = len(target.share_PX)
    counts_LPX = pool(picks_LTX, population_T, num_populations, is_counted_T)
    probs_LPX = pool(router_probs_LTX, population_T, num_populations, is_counted_T)
    counts_LPX, num_tokens, num_ranks = over_ranks(counts_LPX, is_counted_T)
    if window is not None:  # micro-batches are small: even routing within each would forbid experts of a domain
        counts_LPX = window.add(counts_LPX)
    return (target.pressure_PX(counts_LPX) * probs_LPX).sum((1, 2)).mean() * (num_ranks / num_tokens.clamp(min=1))


def over_ranks(counts_LPX: Tensor, is_counted_T: Tensor) -> tuple[Tensor, Tensor, int]:
    """Pick counts and number of counted tokens summed over all ranks, and the number of ranks."""
    num_tokens = is_counted_T.sum().float()
    if not (dist.is_available() and dist.is_initialized()):
        return counts_LPX, num_tokens, 1
    sums = torch.cat([counts_LPX.flatten(), num_tokens[None]])  # one collective a micro-batch, not two
    dist.all_reduce(sums)
    return sums[:-1].view_as(counts_LPX), sums[-1], dist.get_world_size()


def balance_loss_sample(
    *,
    router_probs_LTX: Tensor,
    picks_LTX: Tensor,
    is_counted_T: Tensor,
    sample_T: Tensor,
    population_T: Tensor,
    target: Target,
) -> Tensor:
    """The mean over samples of the loss on each, all layers pooled: LLaVA-MoLE (2401.16160) as released, times X.

    So every sample, of whatever domain, is pushed to use all experts evenly, while a layer that always takes the same
    expert goes unpunished when another makes up for it. Samples without a counted token are left out.
    """
    num_layers, num_samples, num_populations = len(picks_LTX), int(sample_T[-1]) + 1, len(target.share_PX)
    cell_T = sample_T * num_populations + population_T
    num_cells = num_samples * num_populations

    def pooled_BPX(values_LTX: Tensor) -> Tensor:
        sums_CX = pool(values_LTX, cell_T, num_cells, is_counted_T).sum(0)
        return sums_CX.unflatten(0, (num_samples, num_populations))

    tokens_B = tokens_of(cell_T, num_cells, is_counted_T).view(num_samples, num_populations).sum(1)
    probs_BPX = pooled_BPX(router_probs_LTX) / (num_layers * tokens_B.clamp(min=1)[:, None, None])
    loss_B = (target.pressure_PX(pooled_BPX(picks_LTX)) * probs_BPX).sum((1, 2))
    return loss_B.sum() / (tokens_B > 0).sum().clamp(min=1)


BALANCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "global_batch": balance_loss_global_batch,
    "layer": balance_loss_layer,
    "sample": balance_loss_sample,
}


def moved_selection_bias(bias_X: Tensor, counts_PX: Tensor, target: Target, rate: float) -> Tensor:
    """Loss-free balance (DeepSeek, 2408.15664, Alg. 1): b + rate · sign(picks due - picks got), after each step.

    counts_PX: picks of one layer in that step, over all ranks. Null experts of one set move together.
    """
    due_X = (counts_PX.sum(1, keepdim=True) * target.share_PX.to(counts_PX)).sum(0)
    got_X = counts_PX.sum(0)
    for null_set in target.null_sets:
        got_X[null_set] = got_X[null_set].mean()
    return bias_X + rate * (due_X - got_X).sign()


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    "step": lambda progress: float(progress >= 0.5),
}


def scheduled(first: float, last: float | None, schedule: str, progress: float) -> float:
    """A weight on its way from `first` to `last`, progress in [0, 1] of training.

    "step" changes half-way: AdaMoE's α1 in the first of two epochs, α2 in the second (2406.13233, section 3.3).
    """
    return first if last is None else first + SCHEDULES[schedule](min(1.0, max(0.0, progress))) * (last - first)


def z_loss(*, router_logits_LTX: Tensor, is_counted_T: Tensor) -> Tensor:
    """Mean over layers and counted tokens of logsumexp(logits)²: keeps logits small (ST-MoE, 2202.08906, Eq. 5)."""
    squares_LT = router_logits_LTX.logsumexp(-1).square()
    return (squares_LT * is_counted_T).sum() / (is_counted_T.sum().clamp(min=1) * len(squares_LT))


def domain_loss(*, router_logits_LTX: Tensor, is_due_TE: Tensor, is_counted_T: Tensor) -> Tensor:
    """Mean over layers and counted tokens of -log P(an expert of the token's domain | a real expert).

    is_due_TE: bool, the experts of the domain, at least one that the token may take. Null experts are left out of the
    probability, so that their share is balance's affair alone.
    """
    real_LTE = router_logits_LTX[..., : is_due_TE.shape[1]]
    losses_LT = real_LTE.logsumexp(-1) - real_LTE.masked_fill(~is_due_TE, -torch.inf).logsumexp(-1)
    return losses_LT[:, is_counted_T].mean() if is_counted_T.any() else losses_LT.sum() * 0.0
