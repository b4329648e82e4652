import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm.common.errors import UserError
from mllm.routing import GATES, route
from tests.mllm.routing.slow import assert_close_gradients, few, slow_route

LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, -1.0]])


@st.composite
def routes(draw):
    """Logits and every option of `route` but random dropping."""
    num_experts, num_nulls = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    columns, tokens = num_experts + num_nulls, draw(st.integers(1, 6))
    top_k = draw(st.integers(1, columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    allowed_TX = torch.rand(tokens, columns, generator=generator) < 0.6
    forced_TK = torch.rand(tokens, columns, generator=generator).topk(top_k).indices
    logits_TX = torch.randn(tokens, columns, generator=generator) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    return logits_TX, {
        "top_k": top_k,
        "num_experts": num_experts,
        "gate": draw(st.sampled_from(list(GATES))),
        "allowed_TX": draw(st.sampled_from([None, allowed_TX.scatter(1, forced_TK, True)])),
        "selection_bias_X": draw(st.sampled_from([None, torch.randn(columns, generator=generator)])),
        "renormalize": draw(st.sampled_from([None, True, False])),
        "top_p": draw(st.sampled_from([None, 0.3, 0.7, 1.0])),
    }


@few(120)
@given(routes())
def test_a_routing_and_its_gradients_equal_the_definition_token_by_token(drawn):
    values_TX, options = drawn
    logits_TX = values_TX.clone().requires_grad_()
    fast, slow = route(logits_TX, **options), slow_route(logits_TX, **options)
    assert torch.equal(fast.expert_ids_TK, slow.expert_ids_TK)
    assert torch.equal(fast.is_taken_TK, slow.is_taken_TK)
    assert torch.equal(fast.router_logits_TX, slow.router_logits_TX)
    torch.testing.assert_close(fast.router_probs_TX, slow.router_probs_TX)
    torch.testing.assert_close(fast.expert_weights_TK, slow.expert_weights_TK)
    by_hand_TX = torch.zeros_like(values_TX)
    for token, ids in enumerate(slow.expert_ids_TK.tolist()):
        for slot, expert in enumerate(ids):
            by_hand_TX[token, expert] = slow.expert_weights_TK[token, slot].item()
    torch.testing.assert_close(fast.weights_TE.detach(), by_hand_TX[:, : options["num_experts"]])
    cotangents = [torch.randn_like(t) for t in (fast.expert_weights_TK, fast.router_probs_TX)]

    def scalar(routing):
        return (routing.expert_weights_TK * cotangents[0]).sum() + (routing.router_probs_TX * cotangents[1]).sum()

    assert_close_gradients(scalar(fast), scalar(slow), [logits_TX], atol=1e-5, rtol=1e-4)


@few(60)
@given(routes())
def test_sorted_picks_are_the_real_picks_expert_by_expert(drawn):
    logits_TX, options = drawn
    routing = route(logits_TX, **options)
    token_N, slot_N, counts_E = routing.sorted_picks
    expected = [
        (expert, token, slot)
        for expert in range(options["num_experts"])
        for token, ids in enumerate(routing.expert_ids_TK.tolist())
        for slot, picked in enumerate(ids)
        if picked == expert and routing.is_taken_TK[token, slot]
    ]
    assert list(zip(token_N.tolist(), slot_N.tolist(), strict=True)) == [pick[1:] for pick in expected]
    assert counts_E == [sum(pick[0] == e for pick in expected) for e in range(options["num_experts"])]


@few(60)
@given(routes())
def test_picks_are_one_for_taken_experts_and_no_token_takes_what_it_may_not(drawn):
    logits_TX, options = drawn
    routing = route(logits_TX.requires_grad_(), **options)
    assert torch.equal(routing.picks_TX.sum(1), routing.is_taken_TK.sum(1).float())
    assert not routing.picks_TX.requires_grad
    if options["allowed_TX"] is not None:
        forbidden_TX = ~options["allowed_TX"]
        assert not routing.picks_TX[forbidden_TX].any()
        assert not routing.router_probs_TX[forbidden_TX].any()
        assert routing.router_logits_TX[forbidden_TX].isneginf().all()


def test_the_most_probable_experts_are_picked_best_first():
    routing = route(LOGITS, top_k=2, gate="softmax")
    assert routing.expert_ids_TK.tolist() == [[0, 2], [1, 0]]
    torch.testing.assert_close(routing.router_probs_TX, LOGITS.softmax(-1))
    assert torch.equal(routing.router_logits_TX, LOGITS)


def test_softmax_weighs_a_lone_pick_with_its_probability():
    routing = route(LOGITS, top_k=1, gate="softmax")
    torch.testing.assert_close(routing.expert_weights_TK[:, 0], LOGITS.softmax(-1).amax(-1))


@pytest.mark.parametrize("num_experts", [1, 2, 3])
def test_softmax_weights_of_several_picks_sum_to_one_over_the_real_ones(num_experts):
    routing = route(LOGITS, top_k=2, gate="softmax", num_experts=num_experts)
    has_real_T = routing.is_real_TK.any(1)
    torch.testing.assert_close(routing.expert_weights_TK.sum(1), has_real_T.float())
    assert not routing.expert_weights_TK[~routing.is_real_TK].any()


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
    weights = route(logits, top_k=2, gate="straight_through", renormalize=False).expert_weights_TK
    weights.sum().backward()
    assert torch.equal(weights.detach(), torch.ones(1, 2))
    assert torch.isfinite(logits.grad).all()


def test_gate_none_gives_weights_without_gradient():
    weights = route(LOGITS.clone().requires_grad_(), top_k=1, gate="none").expert_weights_TK
    assert torch.equal(weights, torch.ones(2, 1))
    assert not weights.requires_grad


def test_weights_by_expert_are_zero_for_every_expert_not_picked():
    weights = route(LOGITS, top_k=1, gate="none").weights_TE
    assert weights.tolist() == [[1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_a_token_of_null_picks_alone_weighs_nothing_and_has_finite_gradients(gate, renormalize):
    logits = torch.tensor([[0.0, 5.0, 4.0]], requires_grad=True)
    routing = route(logits, top_k=2, gate=gate, num_experts=1, renormalize=renormalize)
    assert routing.expert_weights_TK.tolist() == [[0, 0]]
    (routing.expert_weights_TK.sum() + routing.router_probs_TX[0, 0]).backward()
    assert torch.isfinite(logits.grad).all()


def test_a_selection_bias_changes_the_choice_and_not_the_weight():
    routing = route(LOGITS, top_k=1, gate="softmax", selection_bias_X=torch.tensor([0.0, 0.0, 2.0]))
    assert routing.expert_ids_TK.tolist() == [[2], [2]]
    torch.testing.assert_close(routing.expert_weights_TK[:, 0], LOGITS.softmax(-1)[:, 2])


def test_top_p_always_keeps_the_first_pick_and_stops_once_the_mass_is_reached():
    sharp, flat = [10.0, 0.0, 0.0], [0.0, 0.1, 0.2]
    routing = route(torch.tensor([sharp, flat]), top_k=3, gate="softmax", top_p=0.5)
    assert routing.is_taken_TK.tolist() == [[True, False, False], [True, True, False]]


def test_random_dropping_leaves_out_that_share_of_picks_and_renormalises_over_the_rest():
    routing = route(torch.randn(4000, 4), top_k=2, gate="softmax", drop_share=0.3)
    assert abs(1 - routing.is_taken_TK.float().mean() - 0.3) < 0.02  # 4 standard deviations
    assert not routing.expert_weights_TK[~routing.is_taken_TK].any()
    torch.testing.assert_close(routing.expert_weights_TK.sum(1), routing.is_taken_TK.any(1).float())


def test_an_unknown_gate_is_refused_with_the_choices():
    with pytest.raises(UserError, match="straight_through, softmax, none"):
        route(LOGITS, top_k=1, gate="soft")
