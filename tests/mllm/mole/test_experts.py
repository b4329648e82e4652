import pytest
import torch

from mllm.mole.experts import fast_experts, slow_experts
from mllm.routing import route

SIZES = [(1, 1, 1, 1), (5, 3, 4, 2), (17, 8, 4, 5)]  # tokens, width, experts, rank


def both(sizes, top_k, gate, dtype):
    """Outputs and all gradients of the fast path and of the slow loop."""
    tokens, width, num_experts, rank = sizes
    results = []
    for path in ("fast", "slow"):
        torch.manual_seed(0)
        logits = torch.randn(tokens, num_experts, requires_grad=True)
        shapes = [(tokens, 7), (tokens, width), (num_experts, rank, width), (num_experts, rank, 7)]
        tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        routing = route(logits, top_k=min(top_k, num_experts), gate=gate)
        if path == "fast":
            output = fast_experts(*tensors, routing.weights_TX)
        else:
            output = slow_experts(*tensors, routing.expert_ids_TK, routing.expert_weights_TK.to(dtype))
        (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append([output.float(), *(t.grad.float() for t in tensors), logits.grad])
    return results


@pytest.mark.parametrize("gate", ["straight_through", "softmax", "none"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("sizes", SIZES)
def test_fast_experts_equal_the_slow_loop_with_all_gradients(sizes, top_k, gate):
    fast, slow = both(sizes, top_k, gate, torch.float32)
    assert (fast[-1] is None) == (slow[-1] is None) == (gate == "none")
    for left, right in zip(fast[: 5 if gate == "none" else 6], slow, strict=False):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)  # worst seen 1.1e-5


@pytest.mark.parametrize("top_k", [1, 2])
def test_fast_experts_equal_the_slow_loop_in_bf16(top_k):
    fast, slow = both((17, 8, 4, 5), top_k, "softmax", torch.bfloat16)
    for left, right in zip(fast, slow, strict=True):
        assert (left - right).norm() <= 0.02 * right.norm()  # worst seen 0.0067: bf16 keeps 8 bits


def test_fast_experts_keep_the_type_of_the_base_output():
    base = torch.randn(3, 5, dtype=torch.bfloat16)
    A, B = torch.randn(2, 1, 4), torch.randn(2, 1, 5)
    assert fast_experts(base, torch.randn(3, 4), A, B, torch.ones(3, 2)).dtype == torch.bfloat16
