"""Experts that choose their tokens (2202.09368), as MoMa has it (2407.21770), and causal ways to do so when generating.

T tokens of the batch, padding and both modalities among them, E experts, D width, G groups of experts, P populations,
F = D/2 inner width of an auxiliary router. A token is open to an expert if the expert may take it: it is of the
expert's modality, it is not padding, and, in a layer with mixture of depths, the layer works on it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.moma.context import ExpertChoice, MomaTokens
from mllm.routing import MODALITIES, ExpertLayout
from mllm.routing.layout import ALL, SHARED
from mllm.routing.routers.base import KeepsFp32, without_autocast

MODES = {
    "batch": "expert choice over the training batch",
    "batch_leaky": "expert choice over the batch: leaky, a token's experts depend on later tokens and other rows",
    "threshold": "calibrated thresholds (causal)",
    "aux": "auxiliary routers (causal)",
    "token": "every token for itself (causal)",
}


# -- who is chosen -----------------------------------------------------------------------------------------------------


def capacities(is_open_TE: Tensor, share: float = 1.0) -> Tensor:
    """int64 [E] tokens each expert takes.

    Every token is spread evenly over the experts open to it, times `share`: an expert of modality M with E_M experts
    gets T_M / E_M. Rounding: the running sum over experts is rounded up, so the experts of a modality differ by one at
    most, the earlier ones having more, and together take exactly its T_M tokens. An expert alone takes
    ceil(share · T).
    """
    open_TE = is_open_TE.double()
    due_E = share * (open_TE / open_TE.sum(1, keepdim=True).clamp(min=1)).sum(0)
    bound_E = (due_E.cumsum(0) - 1e-6).ceil().long()  # 1e-6: thirds do not add up to one
    return bound_E.diff(prepend=bound_E.new_zeros(1))


def batch_choice(scores_TE: Tensor, is_open_TE: Tensor, capacity_E: Tensor) -> tuple[Tensor, Tensor]:
    """bool [T, E]: each expert takes the open tokens of highest score; of equal ones, those that come first.

    With them the lowest score that each expert took, [E]; inf where it took none. capacity_E: at most its open tokens.
    """
    scores_TE = scores_TE.masked_fill(~is_open_TE, -torch.inf)
    best_CE = scores_TE.topk(int(capacity_E.max()), dim=0).values
    lowest_1E = F.pad(best_CE, (0, 0, 1, 0), value=torch.inf).gather(0, capacity_E[None])
    is_above_TE, is_level_TE = scores_TE > lowest_1E, (scores_TE == lowest_1E) & is_open_TE
    room_E = capacity_E - is_above_TE.sum(0)
    return is_above_TE | (is_level_TE & (is_level_TE.cumsum(0) <= room_E)), lowest_1E[0]


def slow_batch_choice(scores_TE: Tensor, is_open_TE: Tensor, capacity_E: Tensor) -> Tensor:
    """The definition, one expert at a time. Used by tests; read this first."""
    is_chosen_TE = torch.zeros_like(is_open_TE)
    for e, capacity in enumerate(capacity_E.tolist()):
        open_tokens = [t for t in range(len(scores_TE)) if is_open_TE[t, e]]
        best = sorted(open_tokens, key=lambda t: (-float(scores_TE[t, e]), t))[:capacity]
        is_chosen_TE[best, e] = True
    return is_chosen_TE


def all_ranks(scores_TE: Tensor, is_open_TE: Tensor) -> tuple[Tensor, Tensor, slice]:
    """Scores and openness of all ranks' tokens, rank after rank, and where this rank's stand.

    No gradient. Ranks may hold different numbers of tokens: they are filled up with closed ones. All must call it.
    """
    scores_TE = scores_TE.detach().masked_fill(~is_open_TE, -torch.inf)
    tokens = len(scores_TE)
    if not (dist.is_available() and dist.is_initialized()):
        return scores_TE, is_open_TE, slice(0, tokens)
    most = torch.tensor(tokens, device=scores_TE.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    filled_TE = F.pad(scores_TE, (0, 0, 0, int(most) - tokens), value=-torch.inf)
    parts = [torch.empty_like(filled_TE) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, filled_TE)
    joined_TE = torch.cat(parts)
    start = dist.get_rank() * int(most)
    return joined_TE, ~joined_TE.isneginf(), slice(start, start + tokens)


# -- routers -----------------------------------------------------------------------------------------------------------


class AuxiliaryRouter(KeepsFp32):
    """σ(SiLU(x W1) W2), W1 of each group its own: predicts from the token alone what the batch would choose (MoMa)."""

    def __init__(self, width: int, group_sizes: list[int]) -> None:
        super().__init__()
        self.group_sizes = group_sizes
        self.inner = nn.Parameter(torch.empty(len(group_sizes), width // 2, width))
        self.outer = nn.Parameter(torch.empty(sum(group_sizes), width // 2))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """hidden_TD -> logits_TE, fp32; no gradient to the hidden states."""
        with without_autocast(hidden_TD):
            hidden_TD = hidden_TD.detach().float()
            outer = self.outer.float().split(self.group_sizes)
            inner = [F.silu(F.linear(hidden_TD, inner_FD)) for inner_FD in self.inner.float()]
            return torch.cat([F.linear(inner_TF, outer_EF) for inner_TF, outer_EF in zip(inner, outer, strict=True)], 1)


class ChoiceRouter(KeepsFp32):
    """hidden_TD -> logits_TE, and `choose` -> ExpertChoice. A bias-free linear map and a sigmoid, fp32 whatever the
    model computes in.

    The module's own output is a tensor: of an ExpertChoice DeepSpeed would not see what its backward pass needs, and
    ZeRO-3 would not gather the weight for it.

    An expert that shares its tokens with no other takes all of them, in every mode, with weight one.
    `threshold` [E] is the running mean of cut-off scores over training batches; before the first it is 1/2.
    """

    def __init__(
        self,
        width: int,
        layout: ExpertLayout,
        *,
        share: float = 1.0,
        noise: float = 0.0,
        momentum: float = 0.99,
        is_global: bool = False,
        with_auxiliary: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.share, self.noise, self.momentum, self.is_global = layout, share, noise, momentum, is_global
        self.width = width
        self.weight = nn.Parameter(torch.empty(layout.num_experts, width))
        self.auxiliary: AuxiliaryRouter | None = None
        if with_auxiliary:
            self.add_auxiliary()
        self.register_buffer("threshold", torch.full((layout.num_experts,), 0.5))
        self.register_buffer("batches_seen", torch.zeros(layout.num_experts))
        self.register_buffer("allowed_PE", layout.allowed_PX, persistent=False)
        self.register_buffer("is_lone_E", self._is_lone(), persistent=False)

    def _is_lone(self) -> Tensor:
        owners = self.layout.group_of_expert
        open_to = [[owner in (ALL, SHARED, modality) for owner in owners] for modality in MODALITIES]
        return torch.tensor(
            [self.share == 1 and all(sum(row) == 1 for row in open_to if row[e]) for e in range(len(owners))]
        )

    def add_auxiliary(self) -> None:
        """Give it an auxiliary router, which does not learn until it is told to."""
        auxiliary = AuxiliaryRouter(self.width, list(self.layout.groups.values()))
        self.auxiliary = auxiliary.to(self.weight.device).requires_grad_(False)

    @property
    def is_trainable(self) -> bool:
        """Whether it learns itself."""
        return self.weight.requires_grad

    @property
    def trains_auxiliary(self) -> bool:
        """Whether its auxiliary router is what learns."""
        return self.auxiliary is not None and self.auxiliary.inner.requires_grad

    def forward(self, hidden_TD: Tensor) -> Tensor:
        with without_autocast(hidden_TD):
            return F.linear(hidden_TD.float(), self.weight.float())

    def choose(self, hidden_TD: Tensor, tokens: MomaTokens, is_open_T: Tensor) -> ExpertChoice:
        """What the experts choose among the open tokens, in the forward's mode."""
        allowed_TE = self.allowed_PE[tokens.modality_T] if self.layout.is_grouped else self.allowed_PE
        is_open_TE = allowed_TE & is_open_T[:, None]
        clean_TE = self(hidden_TD).masked_fill(~allowed_TE, -torch.inf)
        logits_TE = self._with_noise(clean_TE)
        scores_TE = logits_TE.sigmoid().masked_fill(self.is_lone_E & allowed_TE, 1)
        auxiliary_TE = cutoff_E = None
        if tokens.mode == "aux" or self.trains_auxiliary:
            auxiliary_TE = self.auxiliary(hidden_TD)
        if tokens.mode in ("batch", "batch_leaky"):
            is_chosen_TE, cutoff_E = self._choose(scores_TE.detach(), is_open_TE)
            if logits_TE is not clean_TE:  # thresholds are for evaluation, which has no noise
                cutoff_E = self._choose(clean_TE.detach().sigmoid(), is_open_TE)[1]
        elif tokens.mode == "aux":
            is_chosen_TE = (auxiliary_TE > 0) & is_open_TE
        else:
            is_chosen_TE = (scores_TE >= self.threshold) & is_open_TE
        is_chosen_TE = is_chosen_TE | (self.is_lone_E & is_open_TE)
        return ExpertChoice(logits_TE, scores_TE, is_open_TE, is_chosen_TE, cutoff_E, auxiliary_TE)

    def _with_noise(self, logits_TE: Tensor) -> Tensor:
        """The difference of two Gumbel variables is logistic, the logit of a uniform one."""
        if not (self.training and self.noise > 0 and self.is_trainable):
            return logits_TE
        return logits_TE + self.noise * torch.rand_like(logits_TE).logit(eps=1e-6)

    def _choose(self, scores_TE: Tensor, is_open_TE: Tensor) -> tuple[Tensor, Tensor]:
        own = slice(None)
        if self.is_global:
            scores_TE, is_open_TE, own = all_ranks(scores_TE, is_open_TE)
        is_chosen_TE, cutoff_E = batch_choice(scores_TE, is_open_TE, capacities(is_open_TE, self.share))
        return is_chosen_TE[own], cutoff_E

    @torch.no_grad()
    def track(self, cutoff_E: Tensor) -> None:
        """Move thresholds towards a batch's cut-offs: their plain mean at first, later with momentum."""
        cutoff_E = cutoff_E.to(self.threshold.device)
        has_E = cutoff_E.isfinite()
        self.batches_seen += has_E
        rate_E = (1 / self.batches_seen.clamp(min=1)).clamp(min=1 - self.momentum) * has_E
        self.threshold.lerp_(cutoff_E.where(has_E, self.threshold), rate_E)


# -- after a forward ---------------------------------------------------------------------------------------------------


def auxiliary_loss(choices: list[ExpertChoice]) -> Tensor:
    """Binary cross entropy of auxiliary routers to what the batch chose: mean over open pairs, then over routers."""
    losses = []
    for choice in choices:
        is_open_TE = choice.is_open_TE.float()
        loss_TE = F.binary_cross_entropy_with_logits(
            choice.auxiliary_logits_TE, choice.is_chosen_TE.float(), weight=is_open_TE, reduction="none"
        )
        losses.append(loss_TE.sum() / is_open_TE.sum().clamp(min=1))
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


@torch.no_grad()
def mean_over_ranks(cutoffs: Tensor) -> Tensor:
    """Cut-offs averaged over the ranks that have one; inf where none has. All ranks must call it together."""
    if not (dist.is_available() and dist.is_initialized()):
        return cutoffs
    has = cutoffs.isfinite()
    sums = torch.stack([cutoffs.where(has, 0), has.float()])
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).where(sums[1] > 0, torch.inf)
