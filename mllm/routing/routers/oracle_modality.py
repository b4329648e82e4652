"""Routing by modality, told and not learned: a control."""

from __future__ import annotations

from torch import Tensor

from mllm.routing.context import Tokens
from mllm.routing.routers.base import Router


class OracleModalityRouter(Router):
    """Text tokens take expert 0 first, image tokens expert 1."""

    fixed, learns = True, False

    def forward(self, hidden_TD: Tensor, tokens: Tokens) -> Tensor:
        return ranked_logits(tokens.modality_T % self.spec.layout.num_experts, self.spec.layout.num_experts)


def ranked_logits(first_T: Tensor, num_experts: int) -> Tensor:
    """fp32 [T, E] logits 0, -30, -60 … for the expert named first, the one after it, and so on round."""
    expert_E = first_T.new_tensor(range(num_experts))
    return -30.0 * ((expert_E - first_T[:, None]) % num_experts).float()
