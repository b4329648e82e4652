"""One layer's routing decision: which experts each token takes, and with what weight.

T = B·S tokens, E real experts, X experts a router can choose among (X = E as long as there are no null experts), K
picks. Made by `route` from a router's logits; read by the experts, the losses and the statistics. Knows nothing of
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mllm.errors import UserError


def _straight_through(log_probs_TK: Tensor) -> Tensor:
    # 1 + log p - sg(log p): exactly 1 forward, gradient p / sg(p), and finite where p itself underflows.
    return 1 + (log_probs_TK - log_probs_TK.detach())


GATES = {
    "straight_through": _straight_through,
    "softmax": torch.exp,
    "none": torch.ones_like,
}


@dataclass(frozen=True)
class Routing:
    """What one router decided for T tokens. Everything but the ids is fp32.

    `router_logits_TX` are raw, `router_probs_TX` their softmax. `expert_ids_TK` are the K most probable experts, best
    first; `expert_weights_TK` is the factor each of them enters the output with.
    """

    router_logits_TX: Tensor
    router_probs_TX: Tensor
    expert_ids_TK: Tensor
    expert_weights_TK: Tensor

    @cached_property
    def weights_TX(self) -> Tensor:
        """[T, X] the weights laid out by expert, 0 for every expert not picked. One copy serves a block's linears."""
        return torch.zeros_like(self.router_probs_TX).scatter(1, self.expert_ids_TK, self.expert_weights_TK)


def route(router_logits_TX: Tensor, *, top_k: int, gate: str) -> Routing:
    """Token-choice top-k. Every pick adds its expert's output times its own weight; weights are not renormalised.

    The weight of a pick with probability p:
      "straight_through"  1 in the forward pass, gradient of p / stopgrad(p). The router learns from the task and the
                          output keeps the scale of a single LoRA. A cure for LLaVA-MoLE's missing gradient.
      "softmax"           p, as in Switch (2101.03961, Eq. 2).
      "none"              1, without gradient: LLaVA-MoLE (2401.16160) as released; only a balance or z loss reaches
                          the router.

    Raises UserError for a gate that is none of these.
    """
    if gate not in GATES:
        raise UserError(f"gate={gate!r} is not known; choose one of {', '.join(GATES)}.")
    log_probs_TX = router_logits_TX.log_softmax(-1)
    top_log_probs_TK, expert_ids_TK = log_probs_TX.topk(top_k, dim=-1)
    return Routing(router_logits_TX, log_probs_TX.exp(), expert_ids_TK, GATES[gate](top_log_probs_TK))
