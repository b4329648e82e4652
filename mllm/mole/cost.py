"""What the last forward pass of a model with MOLE cost: its routing, counted by `mllm.routing.cost`.

    model(**batch)
    print(cost(model))

Read from the routings that the pass left in its RoutingContext, so it costs nothing to ask.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from mllm.common.errors import UserError
from mllm.mole import MoleBlock, MoleLinear, routing_context
from mllm.mole.targets import LINEARS, linear_sizes
from mllm.routing import Routing, RoutingContext, TokenRouter
from mllm.routing.cost import Cost, ExpertShape, active_parameters, linear_flops, lora_flops, masked_flops, needed_flops
from mllm.routing.routers.learned import LearnedRouter


def cost(model: nn.Module) -> Cost:
    """Parameters and FLOPs of the last forward, however the model is wrapped (PEFT, DDP).

    Base linears are those of the decoder layers, which see every token; the vision tower, the projector and the head
    are left out of the FLOPs.
    Raises UserError for a model without MOLE, before its first forward, and where weights are spread over ranks.
    """
    context = routing_context(model)
    if context is None or not context.routings:
        raise UserError("A cost is counted from routings: expected a model with MOLE that has run, adapter enabled.")
    parameters = list(model.parameters())
    if any(parameter.numel() == 0 for parameter in parameters):
        raise UserError("The model's weights are spread over ranks (ZeRO-3); count its cost before DeepSpeed does so.")
    tokens = context.batch_size * context.sequence_length
    modules = list(_decoder(model).modules())
    lora, routed = _low_rank(modules, context)
    needed = sum(needed_flops(shape, routing) for shape, routing, _ in routed)
    computed = sum(
        needed_flops(shape, routing) if is_sorted else masked_flops(shape, tokens)
        for shape, routing, is_sorted in routed
    )
    total = sum(parameter.numel() for parameter in parameters)
    unused = sum(shape.parameters - active_parameters(shape, routing) for shape, routing, _ in routed)
    return Cost(
        tokens=tokens,
        total_parameters=total,
        trained_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        active_parameters=total - unused,
        base_flops=base_flops(model, tokens),
        router_flops=sum(_router_flops(module, tokens) for module in modules if isinstance(module, TokenRouter)),
        expert_flops=computed,
        needed_expert_flops=needed,
        lora_flops=sum(lora_flops(shape, tokens) for shape in lora),
    )


def base_flops(model: nn.Module, tokens: int) -> int:
    """What the linears of the decoder layers spend on so many tokens, adapters left out; for any model."""
    linears = (module for module in _decoder(model).modules() if isinstance(module, LINEARS))
    return sum(linear_flops(tokens, *linear_sizes(linear)) for linear in linears)


def _decoder(model: nn.Module) -> nn.Module:
    """The language model's layers, or the whole of a model that is not transformers'."""
    hugging_face = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    return model if hugging_face is None else hugging_face.get_decoder()


def _low_rank(
    modules: list[nn.Module], context: RoutingContext
) -> tuple[list[ExpertShape], list[tuple[ExpertShape, Routing, bool]]]:
    """Plain LoRA, and experts with the routing that they followed and whether they were computed sorted."""
    routing_of = {id(m.slot): context.routings[m.layer] for m in modules if isinstance(m, MoleBlock)}
    lora, routed = [], []
    for module in modules:
        if not isinstance(module, MoleLinear):
            continue
        experts = module.mole_experts[module.active_adapters[0]]
        shape = ExpertShape(
            *linear_sizes(module.base_layer), tuple(experts.ranks), shares_a=len(experts.A) < len(experts.B)
        )
        if module.layer is not None:
            routed.append((shape, context.routings[module.layer], experts.is_sorted))
        elif module.slot is not None:
            routed.append((shape, routing_of[id(module.slot)], experts.is_sorted))
        else:
            lora.append(shape)
    return lora, routed


def _router_flops(router: TokenRouter, tokens: int) -> int:
    """A linear map, or nothing for a router that goes by rule."""
    if not isinstance(router.router, LearnedRouter):
        return 0
    rows, width = router.router.weight.shape
    return linear_flops(tokens, width, rows)
