"""Routers: from a token's hidden state to one logit for each expert.

T tokens, D width, X experts a token can choose among.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Linear):
    """A learned router: one linear map with bias, the framework's default initialisation (LLaVA-MoLE, 2401.16160).

    Computes in fp32 whatever the model computes in: the input and the weights are cast up and autocast is off inside,
    because near-ties in bf16 logits would be broken by rounding. The weights themselves stay fp32 through
    `model.to(torch.bfloat16)` and `model.half()`. What reassigns parameters without asking the module, as DeepSpeed
    does with `bf16.enabled`, still rounds the stored weights; train with DeepSpeed's `torch_autocast` to keep them fp32
    there.

    `router.requires_grad_(False)` makes it the frozen random router that every study needs as a control.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__(width, num_experts, dtype=torch.float32)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """hidden_TD [T, D] in any float type -> router_logits_TX [T, X], fp32."""
        with torch.autocast(device_type=hidden_TD.device.type, enabled=False):
            return F.linear(hidden_TD.float(), self.weight.float(), self.bias.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # Moves between devices pass through; a change of type does not.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
