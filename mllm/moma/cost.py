"""What the last forward of a Moma model cost, in the terms of `mllm.routing.cost`.

T tokens, W tokens that a layer works on (with mixture of depths), D width, I inner width, E experts, B rows.
"""

from __future__ import annotations

from torch import nn

from mllm.common.errors import UserError
from mllm.moma.context import ExpertChoice
from mllm.moma.expert_choice import ChoiceRouter
from mllm.moma.modeling import DenseFFN, MomaDecoderLayer, MomaForCausalLM
from mllm.routing import TokenRouter
from mllm.routing.cost import Cost, linear_flops, picks_E
from mllm.routing.routers.learned import LearnedRouter


def moma_cost(model: MomaForCausalLM) -> Cost:
    """Parameters and FLOPs of the last forward, without a cache; head and attention scores are left out.

    `base_flops` are attention, a dense model's FFN and the FFN beside routed experts; `expert_flops` the picks, none of
    them computed in vain. Raises UserError before the first forward and where weights are spread over ranks.
    """
    context = model.routing_context
    tokens = context.batch_size * context.sequence_length
    parameters = list(model.parameters())
    if not tokens or any(parameter.numel() == 0 for parameter in parameters):
        raise UserError("A cost is counted from a forward: expected a whole model (no ZeRO-3) that has run.")
    base = router = expert = 0
    idle = 0.0
    for layer in model.model.layers:
        worked, attended = _worked(layer, model)
        base += sum(linear_flops(attended, *_sizes(linear)) for linear in _linears(layer.self_attn))
        router += _router_flops(layer.depth_router, context.choices.get(f"{layer.name}.depth_router"), tokens)
        if isinstance(layer.ffn, DenseFFN):
            base += _ffn_flops(layer.ffn, worked)
            continue
        picks = sum(picks_E(context.routings[layer.ffn.name]))
        one_expert = layer.ffn.experts.gate_up_proj[0].numel() + layer.ffn.experts.down_proj[0].numel()
        expert += 2 * picks * one_expert
        idle += (layer.ffn.experts.num_experts - picks / tokens) * one_expert
        router += _router_flops(layer.ffn.router, context.choices.get(f"{layer.ffn.name}.router"), tokens)
        if layer.ffn.shared_expert is not None:
            base += _ffn_flops(layer.ffn.shared_expert, worked)
    total = sum(parameter.numel() for parameter in parameters)
    return Cost(
        tokens=tokens,
        total_parameters=total,
        trained_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        active_parameters=total - idle,
        base_flops=base,
        router_flops=router,
        expert_flops=expert,
        needed_expert_flops=expert,
        lora_flops=0,
    )


def head_flops(model: MomaForCausalLM) -> int:
    """Of the last forward's product with the vocabulary, where all positions are asked for."""
    context, head = model.routing_context, model.lm_head
    return linear_flops(context.batch_size * context.sequence_length, head.in_features, head.out_features)


def _worked(layer: MomaDecoderLayer, model: MomaForCausalLM) -> tuple[int, int]:
    """Tokens that a layer's FFN works on, and its attention, which fills rows up to the longest."""
    context = model.routing_context
    tokens = context.batch_size * context.sequence_length
    if layer.depth_router is None:
        return tokens, tokens
    is_worked_BS = context.choices[f"{layer.name}.depth_router"].is_chosen_TE.view(context.batch_size, -1)
    return int(is_worked_BS.sum()), context.batch_size * max(1, int(is_worked_BS.sum(1).max()))


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [linear for linear in module.modules() if isinstance(linear, nn.Linear)]


def _sizes(linear: nn.Linear) -> tuple[int, int]:
    return linear.in_features, linear.out_features


def _ffn_flops(ffn: DenseFFN, tokens: int) -> int:
    return sum(linear_flops(tokens, *_sizes(linear)) for linear in _linears(ffn))


def _router_flops(router: ChoiceRouter | TokenRouter | None, choice: ExpertChoice | None, tokens: int) -> int:
    if isinstance(router, ChoiceRouter):
        experts = router.layout.num_experts
        flops = linear_flops(tokens, router.width, experts)
        if choice.auxiliary_logits_TE is not None:
            inner = router.width // 2
            flops += linear_flops(tokens, router.width, inner * len(router.auxiliary.inner))
            flops += linear_flops(tokens, inner, experts)
        return flops
    if isinstance(router, TokenRouter) and isinstance(router.router, LearnedRouter):
        rows, width = router.router.weight.shape
        return linear_flops(tokens, width, rows)
    return 0  # none, or one that goes by rule
