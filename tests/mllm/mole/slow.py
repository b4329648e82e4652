"""MOLE on the toy by its definition: what the whole must equal, with everything looked up by hand.

T tokens, X experts, null experts among them.
"""

import math

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from mllm.mole.experts import slow_experts
from tests.mllm.mole.helpers import IMAGE
from tests.mllm.routing.slow import slow_balance, slow_route, slow_target


def slow_mole(model: PeftModel, input_ids, attention_mask, offset) -> tuple[Tensor, dict[str, Tensor]]:
    """Output [B, S, 6] and routing losses, unweighted, of one forward of `toy_mole`."""
    config, toy = model.peft_config["default"], model.get_base_model()
    is_image_T = (input_ids == IMAGE).flatten()
    population_T = is_image_T.long() if config.expert_groups else torch.zeros_like(input_ids).flatten()
    hidden_TD = (toy.embed(input_ids) + offset).flatten(0, 1)
    routings = []

    def decide(module, x_TI):
        router = module.mole_router["default"]
        routing = slow_route(
            slow_logits(router.router, config, x_TI, is_image_T, module.routing_context),
            top_k=config.top_k,
            gate=config.gate,
            num_experts=config.num_experts,
            allowed_TX=config.layout.allowed_PX[population_T],
            selection_bias_X=router.selection_bias,
            renormalize=config.renormalize,
            top_p=config.top_p,
        )
        routings.append(routing)
        return routing

    def linear(module, x_TI, routing):
        experts, base_TO = module.mole_experts["default"], module.base_layer(x_TI)
        routing = decide(module, x_TI) if routing is None else routing
        scalings = [config.lora_alpha / (math.sqrt(r) if config.use_rslora else r) for r in config.ranks]
        added = slow_experts(base_TO.float(), x_TI.float(), experts.A, experts.B, routing, config.ranks, scalings)
        return added.to(base_TO.dtype)

    output_TD = hidden_TD
    for block in toy.blocks:
        by_block = config.router_input == "block"
        routing, mlp = (decide(block, hidden_TD), block.base_layer) if by_block else (None, block)
        gate, up = (linear(module, hidden_TD, routing) for module in (mlp.gate_proj, mlp.up_proj))
        output_TD = output_TD + linear(mlp.down_proj, F.silu(gate) * up, routing)

    losses = {}
    counted = attention_mask.flatten().bool()
    if config.balance in ("layer", "sample", "global_batch"):
        losses["balance_loss"] = slow_balance(
            config.balance,
            routings,
            counted=counted.tolist(),
            sample=torch.arange(len(input_ids)).repeat_interleave(input_ids.shape[1]).tolist(),
            population=population_T.tolist(),
            target_PX=slow_target(config.layout, config.real_share),
            null_sets=config.layout.null_sets if config.null_balance == "averaged" else (),
        )
    if config.z_loss_weight > 0:
        squares = [row.exp().sum().log() ** 2 for r in routings for row in r.router_logits_TX[counted]]
        losses["z_loss"] = sum(squares) / max(len(squares), 1) * torch.ones(())
    return output_TD.view(*input_ids.shape, -1), losses


def slow_logits(router, config, hidden_TD, is_image_T, context):
    """The learned router's formula; a rule is asked itself."""
    if router.fixed:
        return router(hidden_TD, context)
    rows_TX = hidden_TD.float() @ router.weight.T + router.bias
    if config.modality_prior:
        rows_TX = rows_TX + torch.stack([router.prior[int(is_image)] for is_image in is_image_T])
    columns, row = list(range(config.num_experts)), config.num_experts
    for size in config.layout.nulls.values():
        columns += [row] * size if config.null_logits == "shared" else range(row, row + size)
        row = columns[-1] + 1
    return torch.stack([rows_TX[:, column] for column in columns], 1) / config.router_temperature
