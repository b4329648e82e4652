"""What every router is: a module from hidden states, and what is known of their tokens, to fp32 logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mllm.common.errors import UserError
from mllm.routing.context import Tokens
from mllm.routing.layout import ExpertLayout


@dataclass(frozen=True)
class RouterSpec:
    """What a router is built from; fields as in MoleConfig."""

    width: int
    layout: ExpertLayout
    null_logits: str = "own"
    temperature: float = 1.0
    jitter: float = 0.0
    modality_prior: bool = False
    domains: tuple[str, ...] = ()


class KeepsFp32(nn.Module):
    """A module whose own weights stay fp32 through `model.to(torch.bfloat16)` and `model.half()`; moves pass through.

    What reassigns parameters without asking the module, as DeepSpeed does with `bf16.enabled`, still rounds them; train
    with DeepSpeed's `torch_autocast` to keep them fp32 there.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Autocast off on the tensor's device, where there is any to switch off."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class Router(KeepsFp32, ABC):
    """T tokens, D width, X experts, null experts included.

    `fixed` routers decide by rule, without weights of their own. They cannot weigh null experts, since nothing would
    set their share, and take no prior, jitter or temperature. A router `learns` where its weights are trained. One that
    `counts_patches` reads `Tokens.patch_number_T`, which a cache has to remember. `spec.layout` has `num_experts` real
    and `num_null_experts` null ones, which stand last.
    """

    fixed: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    counts_patches: ClassVar[bool] = False
    # What it goes by, of null_logits, temperature, jitter and modality_prior. MoleConfig refuses the others where they
    # are set: a router that does not read them would pass over them without a word.
    options: ClassVar[frozenset[str]] = frozenset()
    # Whether `weight` [X, D] and `bias` [X] are a linear map on the hidden state, as `start_routers` sets them.
    is_linear: ClassVar[bool] = False

    def __init__(self, spec: RouterSpec) -> None:
        super().__init__()
        self.spec = spec
        if self.fixed and spec.layout.num_null_experts:
            raise UserError(
                f"router={type(self).__module__.rpartition('.')[2]!r} decides by rule and cannot choose null experts; "
                "set num_null_experts=0, or use a learned or frozen_random router."
            )

    @abstractmethod
    def forward(self, hidden_TD: Tensor, tokens: Tokens) -> Tensor:
        """hidden_TD [T, D] in any float type, and who they are -> router_logits_TX [T, X], fp32."""
