import pytest
import torch

from mllm.errors import UserError
from mllm.routing import Router, route

LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, -1.0]])


def test_the_most_probable_experts_are_picked_best_first():
    routing = route(LOGITS, top_k=2, gate="softmax")
    assert routing.expert_ids_TK.tolist() == [[0, 2], [1, 0]]
    torch.testing.assert_close(routing.router_probs_TX, LOGITS.softmax(-1))
    assert torch.equal(routing.router_logits_TX, LOGITS)


def test_softmax_weighs_a_pick_with_its_probability():
    routing = route(LOGITS, top_k=1, gate="softmax")
    torch.testing.assert_close(routing.expert_weights_TK[:, 0], LOGITS.softmax(-1).amax(-1))


def test_straight_through_is_exactly_one_forward_and_p_over_p_backward():
    logits = LOGITS.clone().requires_grad_()
    weights = route(logits, top_k=1, gate="straight_through").expert_weights_TK
    assert torch.equal(weights, torch.ones(2, 1))
    weights.sum().backward()
    reference = LOGITS.clone().requires_grad_()
    probs = reference.softmax(-1).amax(-1)
    (probs / probs.detach()).sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad)


def test_straight_through_is_finite_where_the_probability_underflows():
    logits = torch.tensor([[0.0, -300.0]], requires_grad=True)
    weights = route(logits, top_k=2, gate="straight_through").expert_weights_TK
    weights.sum().backward()
    assert torch.equal(weights.detach(), torch.ones(1, 2))
    assert torch.isfinite(logits.grad).all()


def test_gate_none_gives_weights_without_gradient():
    weights = route(LOGITS.clone().requires_grad_(), top_k=1, gate="none").expert_weights_TK
    assert torch.equal(weights, torch.ones(2, 1))
    assert not weights.requires_grad


def test_weights_by_expert_are_zero_for_every_expert_not_picked():
    weights = route(LOGITS, top_k=1, gate="none").weights_TX
    assert weights.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_an_unknown_gate_is_refused_with_the_choices():
    with pytest.raises(UserError, match="straight_through, softmax, none"):
        route(LOGITS, top_k=1, gate="soft")


def test_the_router_moves_between_devices_but_keeps_fp32():
    router = Router(4, 2)
    assert router.to(torch.float16).weight.dtype == torch.float32
    moved = router.to("meta", torch.bfloat16)
    assert (moved.weight.device.type, moved.weight.dtype) == ("meta", torch.float32)


def test_the_router_computes_bf16_tokens_in_fp32():
    router, hidden = Router(4, 2), torch.randn(3, 4).bfloat16()
    assert torch.equal(router(hidden), torch.nn.functional.linear(hidden.float(), router.weight, router.bias))
