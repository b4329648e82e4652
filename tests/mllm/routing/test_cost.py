"""The arithmetic of cost on hand-made routings."""

import torch

from mllm.routing import Routing
from mllm.routing.cost import Cost, ExpertShape, active_parameters, lora_flops, masked_flops, needed_flops

SHAPE = ExpertShape(in_features=10, out_features=7, ranks=(2, 3))
NULL = 2


def picked(ids_TK, taken_TK=None):
    """A routing over two real experts and one null expert."""
    ids_TK = torch.tensor(ids_TK)
    taken_TK = torch.ones_like(ids_TK, dtype=torch.bool) if taken_TK is None else torch.tensor(taken_TK)
    logits_TX = torch.zeros(len(ids_TK), 3)
    return Routing(logits_TX, logits_TX.softmax(-1), ids_TK, taken_TK, torch.ones_like(ids_TK).float(), 2)


def test_a_pick_costs_two_operations_for_each_weight_of_its_expert():
    assert needed_flops(SHAPE, picked([[0]])) == 2 * 2 * (10 + 7)
    assert needed_flops(SHAPE, picked([[0, 1], [1, NULL]])) == 2 * (2 + 3 + 3) * (10 + 7)


def test_null_picks_and_empty_slots_need_nothing():
    assert needed_flops(SHAPE, picked([[NULL], [NULL]])) == 0
    assert needed_flops(SHAPE, picked([[0], [1]], [[False], [False]])) == 0


def test_the_masked_path_costs_all_ranks_for_all_tokens():
    assert masked_flops(SHAPE, tokens=4) == 4 * 2 * 5 * (10 + 7)


def test_plain_lora_costs_one_expert_a_token():
    assert lora_flops(ExpertShape(10, 7, (2,)), tokens=4) == needed_flops(SHAPE, picked([[0]] * 4))


def test_active_parameters_are_those_of_the_experts_that_a_token_takes():
    assert active_parameters(SHAPE, picked([[0], [1]])) == 2.5 * (10 + 7)
    assert active_parameters(SHAPE, picked([[0, 1]])) == SHAPE.parameters == 5 * (10 + 7)
    assert active_parameters(SHAPE, picked([[NULL], [1]])) == 1.5 * (10 + 7)


def test_a_shared_a_is_counted_once_for_a_token_that_uses_it():
    shared = ExpertShape(10, 7, (2, 2), shares_a=True)
    assert shared.parameters == 2 * 10 + 4 * 7
    assert active_parameters(shared, picked([[0, 1], [NULL, NULL]])) == 0.5 * shared.parameters


def test_the_added_share_is_what_comes_on_top_of_the_base_linears():
    spent = Cost(1, 1, 1, 1.0, base_flops=100, router_flops=1, expert_flops=5, needed_expert_flops=2, lora_flops=4)
    assert (spent.flops, spent.added_share) == (110, 0.1)
