"""Routing mixed at test time: of the chosen token, in the chosen layers, and only while it lasts."""

import pytest
import torch
import torch.nn.functional as F

from mllm.alignment import mixing, nearest, neighbours_mean, routed_layers, sample_vectors, score
from mllm.alignment.mixing import mixed_routing
from mllm.alignment.routes import chosen_tokens
from mllm.alignment.tail import run
from mllm.alignment.vectors import vector_sizes
from mllm.common.errors import UserError
from tests.mllm.alignment.helpers import tiny, token_rows

SOFTMAX = ("plain", "nulls", "shared_nulls", "mixtral", "olmoe", "qwen2", "qwen3", "deepseek_v2")
EMBEDDINGS = F.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1)


def mixed_up(kind: str, alpha: float):
    """r of four rows without and with the mixing of others' vectors in."""
    model, data = tiny(kind), token_rows(12)
    layers = routed_layers(model, 1)
    table = sample_vectors(model, data, layers)
    targets = neighbours_mean(nearest(EMBEDDINGS, k=2), table)
    inputs, labels, _ = data.batch(range(4))
    chosen, sizes = chosen_tokens(labels, inputs["attention_mask"]), vector_sizes(model, layers)
    with mixed_routing(layers, targets[:4], chosen, sizes, alpha=alpha):
        mixed = sample_vectors(model, data, layers, range(4))
    return table[:4], targets[:4], mixed, sample_vectors(model, data, layers, range(4))


@pytest.mark.parametrize("kind", SOFTMAX)
def test_the_mixture_is_what_it_says_and_is_gone_afterwards(kind):
    own, targets, mixed, after = mixed_up(kind, alpha=0.3)
    torch.testing.assert_close(mixed, 0.7 * own + 0.3 * targets, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, own)


def test_nothing_mixed_in_is_nothing_changed():
    own, _, mixed, _ = mixed_up("plain", alpha=0.0)
    torch.testing.assert_close(mixed, own)


@pytest.mark.parametrize("kind", ["plain", "nulls", "olmoe"])
def test_other_tokens_and_decoding_steps_are_left_alone(kind):
    model, data = tiny(kind), token_rows(4)
    layers = routed_layers(model, 1)
    inputs, labels, _ = data.batch(range(4))
    chosen = chosen_tokens(labels, inputs["attention_mask"])
    sizes = vector_sizes(model, layers) if run(model, inputs, None) is None else None
    probs = _probs(model, layers)
    even = torch.full((4, sum(sizes)), 1 / sizes[0])
    with torch.no_grad(), mixed_routing(layers, even, chosen, sizes, alpha=1.0):
        run(model, inputs, None)
        mixed = _probs(model, layers)
        run(model, {"input_ids": inputs["input_ids"][:, :1], "attention_mask": inputs["attention_mask"][:, :1]}, None)
    is_chosen = (chosen > 0).flatten()
    assert torch.equal(mixed[~is_chosen], probs[~is_chosen])
    torch.testing.assert_close(mixed[is_chosen], torch.full_like(mixed[is_chosen], 1 / sizes[0]))


def _probs(model, layers):
    from mllm.alignment.routes import routing_context

    return routing_context(model).routings[layers[0].name].router_probs_TX.detach()


def test_scores_are_taken_with_each_rows_own_target():
    model, data = tiny("olmoe"), token_rows(12)
    layers = routed_layers(model)
    table = sample_vectors(model, data, layers)
    targets = neighbours_mean(nearest(EMBEDDINGS, k=2), table)
    around = mixing(layers, targets, vector_sizes(model, layers), alpha=1.0)
    together, alone = (score(model, data, batch_size=size, around=around).loss_N for size in (12, 1))
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together, score(model, data).loss_N)


def test_routers_by_sigmoid_are_refused():
    model = tiny("deepseek_v3_groups")
    layers = routed_layers(model, 1)
    with (
        pytest.raises(UserError, match="sigmoids"),
        mixed_routing(layers, torch.ones(1, 4), torch.ones(1, 2), [4]),
    ):
        pass
