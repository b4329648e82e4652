"""Routing by a hash of the token: balanced without learning, blind to meaning (Hash Layers, 2106.04426). A control."""

from __future__ import annotations

from torch import Tensor

from mllm.common.errors import UserError
from mllm.routing.context import Tokens
from mllm.routing.routers.base import Router
from mllm.routing.routers.oracle_modality import ranked_logits

ODD = 2_654_435_761  # Knuth's multiplicative hash: 2^32 over the golden ratio
MASK = (1 << 32) - 1


class HashTokenRouter(Router):
    """A text token's expert follows from its id, a picture patch's from its number among the row's patches."""

    fixed, learns, counts_patches = True, False, True

    def forward(self, hidden_TD: Tensor, tokens: Tokens) -> Tensor:
        if tokens.token_ids_T is None:
            raise UserError('router="hash_token" needs token ids: call the model with input_ids, not inputs_embeds.')
        key_T = tokens.token_ids_T.where(~tokens.is_image_T, tokens.patch_number_T)
        num_experts = self.spec.layout.num_experts
        return ranked_logits(((key_T * ODD & MASK) >> 16) % num_experts, num_experts)
