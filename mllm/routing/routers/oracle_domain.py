"""Routing by the sample's domain, told and not learned: the upper control of a conflict study."""

from __future__ import annotations

from torch import Tensor

from mllm.common.errors import UserError
from mllm.routing.context import Tokens
from mllm.routing.routers.base import Router, RouterSpec
from mllm.routing.routers.oracle_modality import ranked_logits


class OracleDomainRouter(Router):
    """Every token of a sample takes the expert of the sample's domain first: number in `expert_domains`, modulo E.

    The domains of a batch are told with `routing_context(model).set_domains([...])`, one a row; `mllm train` and
    `mllm eval` do so.
    """

    fixed, learns = True, False

    def __init__(self, spec: RouterSpec) -> None:
        super().__init__(spec)
        if not spec.domains:
            raise UserError(
                'router="oracle_domain" needs expert_domains: the names of the domains, in the experts\' order.'
            )

    def forward(self, hidden_TD: Tensor, tokens: Tokens) -> Tensor:
        num_experts = self.spec.layout.num_experts
        return ranked_logits(tokens.domain_T(self.spec.domains) % num_experts, num_experts)
