"""A router with all that turns its logits into a Routing: groups, null experts, gate, choice.

T tokens, D width, X experts, null experts included, P populations (see `mllm.routing.layout`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.routing.context import RoutingContext, Tokens
from mllm.routing.routers import RouterSpec, find_router
from mllm.routing.routers.base import KeepsFp32
from mllm.routing.routing import Routing, route


@dataclass(frozen=True)
class Choice:
    """How picks are chosen and weighed; see `mllm.routing.route`."""

    top_k: int = 1
    gate: str = "straight_through"
    renormalize: bool | None = None
    top_p: float | None = None
    drop_share: float = 0.0


class TokenRouter(KeepsFp32):
    """hidden_TD -> Routing, by the router of that name.

    `selection_bias` [X] is what loss-free balance moves (DeepSeek, 2408.15664); without it there is none.
    """

    def __init__(self, router: str, spec: RouterSpec, choice: Choice, *, with_selection_bias: bool = False) -> None:
        super().__init__()
        self.choice, self.layout = choice, spec.layout
        self.router = find_router(router)(spec)
        allowed_PX = spec.layout.allowed_PX
        self.register_buffer("allowed_PX", allowed_PX if spec.layout.is_grouped else None, persistent=False)
        self.register_buffer("selection_bias", torch.zeros(allowed_PX.shape[1]) if with_selection_bias else None)

    @property
    def is_trainable(self) -> bool:
        """Whether the router has a weight that learns."""
        return any(parameter.requires_grad for parameter in self.router.parameters())

    def forward(self, hidden_TD: Tensor, tokens: Tokens | RoutingContext) -> Routing:
        choice, tokens = self.choice, tokens.on(hidden_TD.device)
        return route(
            self.router(hidden_TD, tokens),
            num_experts=self.layout.num_experts,
            allowed_TX=self._allowed_TX(tokens),
            selection_bias_X=self.selection_bias,
            top_k=choice.top_k,
            gate=choice.gate,
            renormalize=choice.renormalize,
            top_p=choice.top_p,
            drop_share=choice.drop_share,
        )

    def _allowed_TX(self, tokens: Tokens) -> Tensor | None:
        allowed_TX = None if self.allowed_PX is None else self.allowed_PX[tokens.modality_T]
        if not tokens.barred:
            return allowed_TX
        device = tokens.sample_T.device
        if allowed_TX is None:
            allowed_TX = self.layout.allowed_PX[:1].to(device).expand(len(tokens.sample_T), -1)
        left_TX = allowed_TX.clone()
        left_TX[:, list(tokens.barred)] = False
        return left_TX.where(left_TX.any(1, keepdim=True), allowed_TX)
