import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm.mole.experts import masked_experts, slow_experts, sorted_experts
from mllm.routing import GATES, route
from tests.mllm.routing.slow import assert_close_gradients, few, gradients_of

PATHS = ["masked", "sorted"]


def weighted(routing, ranks, scaling_E, path, tensors):
    """The output of a path, given what Experts would give it."""
    if path == "slow":
        return slow_experts(*tensors, routing, ranks, scaling_E)
    scalings = torch.tensor(scaling_E)
    if path == "masked":
        weights_TF = (routing.weights_TE * scalings).repeat_interleave(torch.tensor(ranks), dim=1)
        return masked_experts(*tensors, weights_TF)
    picks = routing.sorted_picks
    weights_N = routing.expert_weights_TK[picks.token_N, picks.slot_N]
    weights_N = weights_N * scalings.repeat_interleave(torch.tensor(picks.counts_E))
    return sorted_experts(*tensors, picks, weights_N, ranks)


@st.composite
def problems(draw, dtype=torch.float32):
    """Tokens, experts of several ranks, a routing with null picks and empty slots."""
    shared_a = draw(st.booleans())
    ranks = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    if shared_a:
        ranks = [ranks[0]] * len(ranks)
    columns, tokens = len(ranks) + draw(st.integers(0, 3)), draw(st.integers(1, 12))
    width, out, rows_of_A = draw(st.integers(1, 6)), 7, ranks[0] if shared_a else sum(ranks)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits_TX = torch.randn(tokens, columns, generator=generator).requires_grad_()
    routing = route(
        logits_TX,
        top_k=draw(st.integers(1, min(columns, 3))),
        gate=draw(st.sampled_from(list(GATES))),
        num_experts=len(ranks),
        top_p=draw(st.sampled_from([None, 0.6])),
    )
    shapes = [(tokens, out), (tokens, width), (rows_of_A, width), (sum(ranks), out)]
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    scaling_E = [draw(st.sampled_from([0.5, 2.0])) for _ in ranks]
    return logits_TX, routing, ranks, scaling_E, tensors


def losses(drawn, path):
    logits_TX, routing, ranks, scaling_E, tensors = drawn
    outputs = [weighted(routing, ranks, scaling_E, p, tensors) for p in (path, "slow")]
    cotangent = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1))
    return outputs, [(output.float() * cotangent).sum() for output in outputs], [logits_TX, *tensors]


@pytest.mark.parametrize("path", PATHS)
@few(60)
@given(drawn=problems())
def test_fast_experts_equal_the_slow_loop_with_all_gradients(path, drawn):
    outputs, scalars, inputs = losses(drawn, path)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    assert_close_gradients(*scalars, inputs, atol=1e-4, rtol=1e-4)  # worst seen 7.6e-6


@pytest.mark.parametrize("path", PATHS)
@few(40)
@given(drawn=problems(torch.bfloat16))
def test_fast_experts_stay_near_the_slow_loop_in_bf16_with_all_gradients(path, drawn):
    outputs, scalars, inputs = losses(drawn, path)
    pairs = zip(*([output, *gradients_of(s, inputs)] for output, s in zip(outputs, scalars, strict=True)), strict=True)
    for left, right in pairs:
        # bf16 keeps 8 bits; a logit's gradient is a difference of products of the cotangent's size, which may cancel
        assert (left - right).float().norm() <= 0.03 * right.float().norm() + 2**-8 * outputs[0].numel() ** 0.5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_null_picks_alone_leave_the_base_output_bit_for_bit(path, dtype):
    logits = torch.tensor([[0.0, 9.0]]).expand(5, 2)
    routing = route(logits, top_k=1, gate="softmax", num_experts=1)
    tensors = [torch.randn(shape, dtype=dtype) for shape in [(5, 7), (5, 3), (2, 3), (2, 7)]]
    assert torch.equal(weighted(routing, [2], [2.0], path, tensors), tensors[0])


@pytest.mark.parametrize("path", PATHS)
def test_experts_nobody_picked_have_a_gradient_of_zero_and_not_none(path):
    # A parameter without a gradient on one rank alone would make a distributed run wait for ever.
    routing = route(torch.tensor([[0.0, 0.0, 9.0]]), top_k=1, gate="none", num_experts=2)
    tensors = [torch.randn(shape, requires_grad=True) for shape in [(1, 7), (1, 3), (4, 3), (4, 7)]]
    weighted(routing, [2, 2], [1.0, 1.0], path, tensors).sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors[2:])


def test_the_sorted_path_computes_no_null_pick():
    routing = route(torch.randn(20, 4), top_k=2, gate="none", num_experts=2)
    real = int(routing.is_real_TK.sum())
    assert 0 < real < 40
    picks = routing.sorted_picks
    assert len(picks.token_N) == sum(picks.counts_E) == real


@pytest.mark.parametrize("path", PATHS)
def test_fast_experts_keep_the_type_of_the_base_output(path):
    routing = route(torch.randn(3, 2), top_k=1, gate="none")
    tensors = [torch.randn(3, 5, dtype=torch.bfloat16), torch.randn(3, 4), torch.randn(2, 4), torch.randn(2, 5)]
    assert weighted(routing, [1, 1], [1.0, 1.0], path, tensors).dtype == torch.bfloat16
