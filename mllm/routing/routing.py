"""One layer's routing decision: which experts each token takes, and with what weight.

T = B·S tokens, E real experts, X = E + null experts (ids E .. X-1, they cost nothing and add nothing), K picks, N real
picks of all tokens. Made by `route` from a router's logits; read by the experts, the losses and the statistics. Knows
nothing of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm.common.errors import UserError


def _straight_through(log_probs_TK: Tensor) -> Tensor:
    # 1 + log p - sg(log p): exactly 1 forward, gradient p / sg(p), and finite where p itself underflows.
    return 1 + (log_probs_TK - log_probs_TK.detach())


GATES = {
    "straight_through": _straight_through,
    "softmax": torch.exp,
    "none": torch.ones_like,
}


class SortedPicks(NamedTuple):
    """The real picks in the order of their experts: row of the token, slot among its K picks, picks of each expert."""

    token_N: Tensor
    slot_N: Tensor
    counts_E: list[int]


@dataclass(frozen=True)
class Routing:
    """What one router decided for T tokens. Logits, probabilities and weights are fp32.

    `router_logits_TX` are raw, -inf where the token may not go; `router_probs_TX` their softmax. `expert_ids_TK` are
    the K picks, best first; `is_taken_TK` is False for a slot that was left empty (top-p, random dropping).
    `expert_weights_TK` is the factor a pick enters the output with: 0 for empty slots and null picks (but for
    identity nulls of `mllm.mole.native_moe`).
    """

    router_logits_TX: Tensor
    router_probs_TX: Tensor
    expert_ids_TK: Tensor
    is_taken_TK: Tensor
    expert_weights_TK: Tensor
    num_experts: int

    @cached_property
    def is_real_TK(self) -> Tensor:
        """bool [T, K] picks that run an expert."""
        return self.is_taken_TK & (self.expert_ids_TK < self.num_experts)

    @cached_property
    def weights_TE(self) -> Tensor:
        """[T, E] the weights laid out by real expert, 0 where not picked. One copy serves a block's linears."""
        weights_TX = torch.zeros_like(self.router_probs_TX).scatter(1, self.expert_ids_TK, self.expert_weights_TK)
        return weights_TX[:, : self.num_experts]

    @cached_property
    def picks_TX(self) -> Tensor:
        """fp32 [T, X] 1 where the token took the expert, null experts among them; no gradient."""
        taken_TK = self.is_taken_TK.to(self.router_probs_TX.dtype)
        return torch.zeros_like(self.router_probs_TX).scatter(1, self.expert_ids_TK, taken_TK)

    @cached_property
    def sorted_picks(self) -> SortedPicks:
        """Null picks and empty slots are not among them. Costs one wait for the device."""
        token_N, slot_N = self.is_real_TK.nonzero(as_tuple=True)
        expert_N = self.expert_ids_TK[token_N, slot_N]
        order_N = expert_N.argsort(stable=True)
        counts_E = expert_N.bincount(minlength=self.num_experts).tolist()
        return SortedPicks(token_N[order_N], slot_N[order_N], counts_E)


def route(
    router_logits_TX: Tensor,
    *,
    top_k: int,
    gate: str,
    num_experts: int | None = None,
    allowed_TX: Tensor | None = None,
    selection_bias_X: Tensor | None = None,
    renormalize: bool | None = None,
    top_p: float | None = None,
    drop_share: float = 0.0,
) -> Routing:
    """Token choice: each token takes the K most probable experts, real or null.

    The weight of a real pick with probability p, before renormalisation:
      "straight_through"  1 in the forward pass, gradient of p / stopgrad(p). The router learns from the task and the
                          output keeps the scale of a single LoRA. A cure for LLaVA-MoLE's missing gradient.
      "softmax"           p, as in Switch (2101.03961, Eq. 2).
      "none"              1, without gradient: LLaVA-MoLE (2401.16160) as released; only a balance or z loss reaches
                          the router.
    Null picks weigh 0.

    Args:
        num_experts: E; columns from E on are null experts (AdaMoE, 2406.13233). None: all are real.
        allowed_TX: bool, the experts a token may take; of fewer than K, slots stay empty. None: all.
        selection_bias_X: added to the probabilities for choosing, never for weighing (loss-free balance, 2408.15664).
        renormalize: divide the weights by their sum over the token's real picks only (AdaMoE, Eq. 5; with "softmax"
            p_i / Σ p_j, with the others 1 / number of real picks). None: where top_k > 1, since a lone pick would weigh
            1 whatever its probability and its router would learn nothing from the task.
        top_p: leave slots empty once the picks before them hold this much probability (2403.07652).
        drop_share: probability that a slot is left empty at random: the control for null experts at equal load.

    Raises UserError for a gate that is none of these.
    """
    if gate not in GATES:
        raise UserError(f"gate={gate!r} is not known; choose one of {', '.join(GATES)}.")
    num_experts = router_logits_TX.shape[1] if num_experts is None else num_experts
    if allowed_TX is not None:
        router_logits_TX = router_logits_TX.masked_fill(~allowed_TX, -torch.inf)
    # Choices go by log-probabilities: beside a dominant expert the probabilities of others underflow to ties at 0.
    log_probs_TX = router_logits_TX.log_softmax(-1)
    probs_TX = log_probs_TX.exp()
    expert_ids_TK = _choose(log_probs_TX, selection_bias_X, top_k)
    log_probs_TK = log_probs_TX.gather(1, expert_ids_TK)
    is_open_TK = ~log_probs_TK.isneginf()  # a token that may take fewer than K leaves slots empty
    is_taken_TK = _taken(probs_TX.detach().gather(1, expert_ids_TK), top_p, drop_share) & is_open_TK
    is_real_TK = is_taken_TK & (expert_ids_TK < num_experts)
    weights_TK = _weights(
        log_probs_TK.masked_fill(~is_open_TK, 0.0), is_real_TK, gate, top_k > 1 if renormalize is None else renormalize
    )
    return Routing(router_logits_TX, probs_TX, expert_ids_TK, is_taken_TK, weights_TK, num_experts)


def _choose(log_probs_TX: Tensor, selection_bias_X: Tensor | None, top_k: int) -> Tensor:
    if selection_bias_X is None:
        return log_probs_TX.topk(top_k, dim=-1).indices
    # A positive bias must not lift an expert that the token's group forbids.
    scores_TX = (log_probs_TX.exp() + selection_bias_X).masked_fill(log_probs_TX.isneginf(), -torch.inf)
    return scores_TX.topk(top_k, dim=-1).indices


def _taken(probs_TK: Tensor, top_p: float | None, drop_share: float) -> Tensor:
    is_taken_TK = torch.ones_like(probs_TK, dtype=torch.bool)
    if top_p is not None:
        is_taken_TK = probs_TK.cumsum(1) - probs_TK < top_p
    if drop_share > 0:
        is_taken_TK = is_taken_TK & (torch.rand_like(probs_TK) >= drop_share)
    return is_taken_TK


def _weights(log_probs_TK: Tensor, is_real_TK: Tensor, gate: str, renormalize: bool) -> Tensor:
    """Zero for what is not real; tokens without a real pick get zeros and finite gradients."""
    if not renormalize:
        return GATES[gate](log_probs_TK) * is_real_TK
    if gate != "softmax":
        return GATES[gate](log_probs_TK) * F.normalize(is_real_TK.float(), p=1, dim=1)
    has_none_T1 = ~is_real_TK.any(1, keepdim=True)
    kept_TK = log_probs_TK.masked_fill(~(is_real_TK | has_none_T1), -torch.inf)
    return kept_TK.softmax(-1) * is_real_TK
