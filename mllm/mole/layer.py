"""The two modules MOLE puts into a model: a routed block, and a frozen linear with experts or plain LoRA beside it.

T tokens, I input width, O output width, E experts, R rank, X = E experts a router chooses among.
Both are called exactly like what they wrap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mllm.errors import UserError
from mllm.mole.config import MoleConfig
from mllm.mole.experts import fast_experts
from mllm.mole.targets import block_linears, linear_sizes
from mllm.routing import Router, Routing, RoutingContext, route


@dataclass
class RoutingSlot:
    """Where a block leaves its routing for its own linears, during its forward only."""

    routing: Routing | None = None


class Experts(nn.Module):
    """Stacked low-rank experts: A [E, R, I] Kaiming-uniform (a = √5) for each, B [E, R, O] zero: they start as nothing.

    One module that holds and uses its own parameters, because ZeRO-3 gathers a module's parameters when the module is
    called.
    """

    def __init__(self, sizes: tuple[int, int], num_experts: int, r: int, scaling: float, dropout: float) -> None:
        super().__init__()
        in_features, out_features = sizes
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.A = nn.Parameter(torch.empty(num_experts, r, in_features))
        self.B = nn.Parameter(torch.zeros(num_experts, r, out_features))
        for A_RI in self.A:
            nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5))

    def forward(self, x: Tensor, base_output: Tensor, routing: Routing | None) -> Tensor:
        """base_output [..., O] + scaling · experts(x [..., I]), in base_output's type.

        Without a routing every token takes the first and only expert: plain LoRA.
        """
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        x_TI = self.dropout(x).flatten(0, -2)
        weights_TE = x.new_full((1, 1), self.scaling) if routing is None else routing.weights_TX * self.scaling
        output_TO = fast_experts(base_output.flatten(0, -2), x_TI, self.A, self.B, weights_TE)
        return output_TO.view(base_output.shape)


class MoleLayer(BaseTunerLayer):
    """What both modules share with PEFT: one adapter, no merging."""

    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def is_active(self) -> bool:
        """False under `disable_adapter()` and when no adapter is selected."""
        return not self.disable_adapters and bool(self.active_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UserError(
            "MOLE cannot be merged into the base weights: each token takes its own experts, so no single matrix does "
            "the same. Keep the adapter beside the base and load both."
        )


class MoleLinear(nn.Module, MoleLayer):
    """A frozen linear with routed experts (slot given) or plain LoRA (no slot) beside it."""

    adapter_layer_names = ("mole_experts",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoleConfig, slot: RoutingSlot | None) -> None:
        nn.Module.__init__(self)
        MoleLayer.__init__(self, base_layer)
        self.slot = slot
        num_experts = 1 if slot is None else config.num_experts
        experts = Experts(linear_sizes(base_layer), num_experts, config.r, config.scaling, config.lora_dropout)
        self.mole_experts = nn.ModuleDict({adapter_name: experts})
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.base_layer(x, *args, **kwargs)
        if not self.is_active:
            return output
        routing = None if self.slot is None else self.slot.routing
        if self.slot is not None and routing is None:
            raise RuntimeError(
                "A linear with experts was called outside its block, so nobody has routed its tokens; call the block."
            )
        return self.mole_experts[self.active_adapters[0]](x, output, routing)


class MoleBlock(nn.Module, MoleLayer):
    """An MLP block whose linears carry experts: routes every token once, from the block's input, then runs the block.

    Every linear follows this decision, the down projection too although it reads a wider input (LLaVA-MoLE,
    2401.16160).
    """

    adapter_layer_names = ("mole_router",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MoleConfig, context: RoutingContext, layer: str
    ) -> None:
        nn.Module.__init__(self)
        MoleLayer.__init__(self, base_layer)
        self.config, self.routing_context, self.layer = config, context, layer
        self.slot = RoutingSlot()
        linears = block_linears(base_layer)
        width, _ = linear_sizes(next(iter(linears.values())))
        self.mole_router = nn.ModuleDict({adapter_name: Router(width, config.num_experts)})
        for name, linear in linears.items():
            setattr(base_layer, name, MoleLinear(linear, adapter_name, config, self.slot))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(adapter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return next(base_layer.parameters()).device, None  # the router follows its block's device, never its type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_active:
            return self.base_layer(*args, **kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()))
        router = self.mole_router[self.active_adapters[0]]
        routing = route(router(hidden.flatten(0, -2)), top_k=self.config.top_k, gate=self.config.gate)
        self.routing_context.record(self.layer, routing, trainable=router.weight.requires_grad)
        self.slot.routing = routing
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            self.slot.routing = None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT's hook for a layer that is undone in its own way: the block with its own linears back in place."""
        if merge:
            self.merge(safe_merge, adapter_names)
        for name, child in self.base_layer.named_children():
            if isinstance(child, MoleLinear):
                setattr(self.base_layer, name, child.base_layer)
        return self.base_layer
