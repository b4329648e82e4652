"""The cost of a forward, against what torch counts while it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm.common.errors import UserError
from mllm.mole.cost import cost
from mllm.routing import TokenRouter
from tests.mllm.mole.helpers import INPUT_IDS, tiny_llama, tiny_mole

TOKENS = INPUT_IDS.numel()
CONFIGS = {
    "masked": {},
    "sorted": {"expert_path": "sorted"},
    "top-2": {"top_k": 2, "expert_path": "sorted"},
    "nulls": {"num_null_experts": 4, "top_k": 2},
    "nulls, sorted": {"num_null_experts": 4, "top_k": 2, "expert_path": "sorted"},
    "shared null logit": {"num_null_experts": 4, "null_logits": "shared", "expert_path": "sorted"},
    "a router a linear": {"router_input": "linear"},
    "a router a linear, sorted": {"router_input": "linear", "expert_path": "sorted"},
    "groups of two ranks": {"expert_groups": {"text": 2, "image": 1}, "r": {"text": 2, "image": 5}},
    "groups, sorted": {
        "expert_groups": {"text": 2, "image": 1},
        "r": {"text": 2, "image": 5},
        "num_null_experts": 2,
        "expert_path": "sorted",
    },
    "shared A": {"shared_a": True, "top_k": 2},
    "shared A, sorted": {"shared_a": True, "top_k": 2, "expert_path": "sorted"},
    "frozen router": {"router": "frozen_random", "balance": "none"},
    "router by rule": {"router": "hash_token", "balance": "none"},
    "dropped picks": {"drop_share": 0.5, "expert_path": "sorted"},
}


def measured(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Module name -> operation -> FLOPs, as torch counts them during one forward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(INPUT_IDS)
    counts = counter.get_flop_counts()
    return {
        name: {str(op): flops for op, flops in by_op.items() if "attention" not in str(op)}
        for name, by_op in counts.items()
    }


def sum_of(counts: dict[str, dict[str, int]], ending: str) -> int:
    """FLOPs of all modules whose name ends so."""
    return sum(sum(by_op.values()) for name, by_op in counts.items() if name.endswith(ending))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_equals_what_torch_counts(name):
    model = tiny_mole(**CONFIGS[name]).eval()
    counts, spent = measured(model), cost(model)
    assert spent.flops == sum(counts["PeftModel.base_model.model.model"].values())
    assert spent.router_flops == sum_of(counts, ".mole_router.default")
    assert spent.expert_flops + spent.lora_flops == sum_of(counts, ".mole_experts.default")
    assert spent.lora_flops == sum(sum_of(counts, f".{p}_proj.mole_experts.default") for p in "qkvo")
    assert spent.base_flops == sum_of(counts, "_proj.base_layer")
    assert spent.tokens == TOKENS


def route_to_nulls(model: torch.nn.Module, share: float) -> None:
    """Every router sends that share of the tokens, the same ones, to the null expert."""
    order = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)).argsort()
    logits_TX = torch.tensor([[9.0, 0.0]]).repeat(TOKENS, 1)
    logits_TX[order[: round(share * TOKENS)]] = torch.tensor([0.0, 9.0])
    for module in model.modules():
        if isinstance(module, TokenRouter):
            module.router.forward = lambda hidden_TD, context: logits_TX


def test_null_picks_cost_nothing_on_the_sorted_path_as_measured():
    model = tiny_mole(num_experts=1, num_null_experts=1, expert_path="sorted", target_modules=[]).eval()
    expert_flops = {}
    for nulls in (0, 7, 14, 21):
        route_to_nulls(model, nulls / TOKENS)
        expert_flops[nulls] = sum_of(measured(model), ".mole_experts.default")
        assert cost(model).expert_flops == expert_flops[nulls]
    full = expert_flops[0]
    assert full > 0
    assert expert_flops == {0: full, 7: full * 2 // 3, 14: full // 3, 21: 0}


def test_the_masked_path_costs_the_same_whatever_was_picked_and_tells_what_was_needed():
    model = tiny_mole(num_experts=1, num_null_experts=1, expert_path="masked").eval()
    spent = []
    for share in (0.0, 1.0):
        route_to_nulls(model, share)
        model(INPUT_IDS)
        spent.append(cost(model))
    assert spent[0].expert_flops == spent[1].expert_flops > 0
    assert (spent[0].needed_expert_flops > 0, spent[1].needed_expert_flops) == (True, 0)


def test_parameters_are_total_trained_and_active():
    model = tiny_mole(num_experts=4, top_k=1)
    model(INPUT_IDS)
    spent = cost(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name and "mole_experts" in name)
    assert spent.total_parameters == sum(p.numel() for p in model.parameters())
    assert spent.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert spent.active_parameters == spent.total_parameters - experts * 3 / 4


def test_a_model_that_has_not_routed_is_refused():
    with pytest.raises(UserError, match="expected a model with MOLE that has run"):
        cost(tiny_llama())
    with pytest.raises(UserError, match="expected a model with MOLE that has run"):
        cost(tiny_mole())
