"""The two modules MOLE puts into a model: a routed block, and a frozen linear with experts or plain LoRA beside it.

T tokens, I input width, O output width, E experts, F = ranks of all experts in a row.
Both are called exactly like what they wrap.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mllm.common.errors import UserError
from mllm.mole.config import MoleConfig
from mllm.mole.experts import masked_experts, sorted_experts
from mllm.mole.targets import block_linears, linear_sizes
from mllm.routing import Routing, RoutingContext, TokenRouter


class RoutingSlot(threading.local):
    """Where a block leaves its routing for its own linears, during its forward only; each thread its own."""

    routing: Routing | None = None

    def __reduce__(self) -> tuple[type[RoutingSlot], tuple[()]]:
        return RoutingSlot, ()  # a copy is empty; the standard way cannot copy what belongs to a thread


class Experts(nn.Module):
    """Stacked low-rank experts: A [F, I] Kaiming-uniform (a = √5), B [F, O] zero: they start as nothing.

    F ranks in a row, expert by expert; A has one expert's ranks where all share it (HydraLoRA, 2404.19245). One module
    that holds and uses its own parameters, because ZeRO-3 gathers a module's parameters when the module is called.
    """

    def __init__(self, sizes: tuple[int, int], ranks: list[int], config: MoleConfig) -> None:
        super().__init__()
        in_features, out_features = sizes
        self.ranks, self.scalings = ranks, [config.scaling(r) for r in ranks]
        self.is_sorted = config.expert_path == "sorted"
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.A = nn.Parameter(torch.empty(ranks[0] if config.shared_a else sum(ranks), in_features))
        self.B = nn.Parameter(torch.zeros(sum(ranks), out_features))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor, base_output: Tensor, routing: Routing | None) -> Tensor:
        """base_output [..., O] + experts(x [..., I]), scaled, in base_output's type.

        Without a routing every token takes the first and only expert: plain LoRA.
        """
        device = x.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            x = x.to(self.A.dtype)
        x_TI, base_TO = self.dropout(x).flatten(0, -2), base_output.flatten(0, -2)
        if routing is not None and self.is_sorted:
            picks = routing.sorted_picks
            weights_N = routing.expert_weights_TK[picks.token_N, picks.slot_N].split(picks.counts_E)
            weights_N = torch.cat([weights * scale for weights, scale in zip(weights_N, self.scalings, strict=True)])
            output_TO = sorted_experts(base_TO, x_TI, self.A, self.B, picks, weights_N, self.ranks)
        else:
            output_TO = masked_experts(base_TO, x_TI, self.A, self.B, self._weights_TF(x, routing))
        return output_TO.view(base_output.shape)

    def _weights_TF(self, x: Tensor, routing: Routing | None) -> Tensor:
        if routing is None:
            return x.new_full((1, 1), self.scalings[0])
        columns = routing.weights_TE.split(1, dim=1)
        spread = zip(columns, self.scalings, self.ranks, strict=True)
        return torch.cat([(weight_T1 * scale).expand(-1, rank) for weight_T1, scale, rank in spread], dim=1)


class MoleLayer(BaseTunerLayer):
    """What both modules share with PEFT: one adapter, no merging."""

    other_param_names = ()
    layer: str | None = None  # name of the routing it makes; None for what has no router

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
    """A frozen linear with low-rank weights beside it: experts or, without any routing, plain LoRA.

    Experts follow the routing their block left in `slot`, or that of the linear's own router (`layer` given).
    """

    adapter_layer_names = ("mole_experts", "mole_router")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoleConfig,
        *,
        slot: RoutingSlot | None = None,
        context: RoutingContext | None = None,
        layer: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        MoleLayer.__init__(self, base_layer)
        self.slot, self.config, self.routing_context, self.layer = slot, config, context, layer
        sizes, is_routed = linear_sizes(base_layer), slot is not None or layer is not None
        experts = Experts(sizes, config.ranks if is_routed else [config.plain_rank], config)
        self.mole_experts = nn.ModuleDict({adapter_name: experts})
        self.mole_router = nn.ModuleDict({adapter_name: token_router(config, sizes[0])} if layer is not None else {})
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.base_layer(x, *args, **kwargs)
        if not self.is_active:
            return output
        return self.mole_experts[self.active_adapters[0]](x, output, self._routing(x))

    def _routing(self, x: Tensor) -> Routing | None:
        if self.layer is not None:
            return decide(self, x)
        if self.slot is not None and self.slot.routing is None:
            raise RuntimeError(
                "A linear with experts was called outside its block, so nobody has routed its tokens; call the block."
            )
        return None if self.slot is None else self.slot.routing


def token_router(config: MoleConfig, width: int) -> TokenRouter:
    """The router that a config describes, for hidden states of that width."""
    spec = config.router_spec(2 * width if config.router_reads == "both" else width)
    return TokenRouter(config.router, spec, config.choice, with_selection_bias=config.balance == "bias")


def decide(module: MoleBlock | MoleLinear, hidden: Tensor) -> Routing:
    """Routes the tokens of hidden [..., D] by the module's own router and records the decision."""
    router, tokens = module.mole_router[module.active_adapters[0]], module.routing_context.on(hidden.device)
    read_TD = hidden.flatten(0, -2)
    if module.config.router_reads == "picture":
        read_TD = tokens.picture_TD
    elif module.config.router_reads == "both":
        read_TD = torch.cat([read_TD, tokens.picture_TD.to(read_TD.dtype)], dim=-1)
    routing = router(read_TD, tokens)
    module.routing_context.record(module.layer, routing, trainable=router.is_trainable)
    return routing


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
        self.mole_router = nn.ModuleDict({adapter_name: token_router(config, width)})
        for name, linear in linears.items():
            setattr(base_layer, name, MoleLinear(linear, adapter_name, config, slot=self.slot))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(adapter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return next(base_layer.parameters()).device, None  # the router follows its block's device, never its type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_active:
            return self.base_layer(*args, **kwargs)
        self.slot.routing = decide(self, args[0] if args else next(iter(kwargs.values())))
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
