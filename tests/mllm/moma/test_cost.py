"""Counted FLOPs against those that torch sees."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm.common.errors import UserError
from mllm.moma import MomaForCausalLM
from mllm.moma.cost import head_flops, moma_cost
from tests.mllm.moma.helpers import IDS, MASK, TOKEN_CHOICE, tiny_config, tiny_moma, with_auxiliary


def by_thresholds(model):
    model.set_evaluation_routing("threshold")
    return model


MODELS = {
    "dense": lambda: tiny_moma("dense"),
    "8x": lambda: tiny_moma("8x"),
    "1t1i": lambda: tiny_moma("1t1i"),
    "2t2i": lambda: tiny_moma("2t2i"),
    "auxiliary": lambda: with_auxiliary(tiny_moma("2t2i")),
    "auxiliary, by thresholds": lambda: by_thresholds(with_auxiliary(tiny_moma("2t2i", mixture_of_depths=0.5))),
    "shared": lambda: tiny_moma("2t2i1s", shared_expert_intermediate_size=16),
    "depth": lambda: tiny_moma("2t2i", mixture_of_depths=0.5),
    "token choice": lambda: tiny_moma("8x", num_experts_per_tok=2, **TOKEN_CHOICE),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_what_torch_counts_of_matrix_products(name):
    model = MODELS[name]()
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IDS, attention_mask=MASK, use_cache=False)
    seen = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in seen.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert moma_cost(model).flops + head_flops(model) == products


def test_models_of_one_shape_cost_the_same_but_for_their_routers_when_experts_choose():
    costs = {}
    for name in ("dense", "1t1i", "2t2i", "8x"):
        model = tiny_moma(name).train()
        with torch.no_grad():
            model(IDS)
        costs[name] = moma_cost(model)
    assert len({cost.flops - cost.router_flops for cost in costs.values()}) == 1
    assert costs["8x"].total_parameters > costs["2t2i"].total_parameters > costs["dense"].total_parameters


def test_a_cost_before_the_first_forward_is_refused():
    with pytest.raises(UserError, match="has run"):
        moma_cost(MomaForCausalLM(tiny_config()))
