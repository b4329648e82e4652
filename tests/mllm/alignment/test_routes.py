"""The routing vector is the chosen token's, whatever stands around it."""

import pytest
import torch

from mllm.alignment import prepare, routed_layers, sample_vectors
from mllm.alignment.routes import TOKENS, chosen_tokens, prompt_mask
from mllm.alignment.vectors import vector_sizes
from mllm.common.errors import UserError
from tests.mllm.alignment.helpers import MOLES, NATIVES, tiny, tiny_mole, token_rows
from tests.mllm.mole.helpers import tiny_llama
from tests.mllm.mole.test_native_moe import INPUT_IDS, tiny_moe

every_kind = pytest.mark.parametrize("kind", [*MOLES, *NATIVES])


@every_kind
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_gives_the_vectors_of_rows_that_stand_alone(kind, side):
    model, data = tiny(kind), token_rows(6, side)
    layers = routed_layers(model)
    alone = torch.cat([sample_vectors(model, data, layers, [row]) for row in range(6)])
    together = sample_vectors(model, data, layers)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


@every_kind
def test_a_vector_holds_a_whole_softmax_of_each_layer(kind):
    model = tiny(kind)
    layers = routed_layers(model)
    vectors = sample_vectors(model, token_rows(4), layers)
    sizes = vector_sizes(model, layers)
    assert vectors.shape[1] == sum(sizes)
    for part in vectors.split(sizes, dim=1):
        torch.testing.assert_close(part.sum(1), torch.ones(4))
    assert (vectors > 0).all()  # all experts, not just those picked; null experts too


def test_the_last_prompt_token_is_the_one_before_the_last_answer():
    labels = torch.tensor([[-100, -100, 7, -100, -100, 8, 9, -100], [-100, -100, -100, -100, -100, -100, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
    assert chosen_tokens(labels, mask).argmax(1).tolist() == [4, 5]
    assert chosen_tokens(labels, mask, "first").argmax(1).tolist() == [0, 3]
    assert prompt_mask(labels, mask).sum(1).tolist() == [5, 3]


def test_a_row_without_an_answer_is_all_prompt():
    labels, mask = torch.full((1, 4), -100), torch.tensor([[1, 1, 1, 0]])
    assert chosen_tokens(labels, mask).tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("token", TOKENS)
def test_every_choice_of_tokens_sums_to_one_over_real_prompt_tokens(token):
    inputs, labels, _ = token_rows(8, "left").batch(range(8))
    weights = chosen_tokens(labels, inputs["attention_mask"], token)
    torch.testing.assert_close(weights.sum(1), torch.ones(8))
    assert not weights[~prompt_mask(labels, inputs["attention_mask"])].any()


def test_logits_are_centred_and_finite_also_where_experts_are_forbidden():
    model = tiny_mole(num_experts=None, expert_groups={"image": 2, "text": 2, "shared": 1})
    layers = routed_layers(model)
    logits = sample_vectors(model, token_rows(4), layers, space="logits")
    probs = sample_vectors(model, token_rows(4), layers)
    for part, probs_of_layer in zip(logits.split(5, 1), probs.split(5, 1), strict=True):
        torch.testing.assert_close(part.sum(1), torch.zeros(4), atol=1e-5, rtol=0)
        assert torch.equal(part == 0, probs_of_layer == 0)
        assert (part == 0).sum() == 4 * 2  # a text token never meets the two image experts


def test_layers_are_the_last_ones_or_those_named():
    model = tiny_mole()
    assert [layer.depth for layer in routed_layers(model, 2)] == [1, 2]
    assert [layer.depth for layer in routed_layers(model)] == [0, 1, 2]
    assert [layer.name for layer in routed_layers(model, (0,))] == ["layers.0.mlp"]
    assert len(routed_layers(tiny_mole(router_input="linear"), 1)) == 3


@pytest.mark.parametrize("layers", [0, (7,), ()])
def test_layers_without_routers_are_refused(layers):
    with pytest.raises(UserError, match="decoder layers with routers"):
        routed_layers(tiny_mole(), layers)


def test_models_without_routers_that_learn_are_refused():
    with pytest.raises(UserError, match="no router"):
        prepare(tiny_llama())
    with pytest.raises(UserError, match="no routers to align"):
        routed_layers(tiny_llama())
    with pytest.raises(UserError, match="nothing in them to align"):
        routed_layers(tiny_mole(router="hash_token", balance="none"))


def test_preparing_a_native_model_leaves_it_as_it_was():
    model = tiny_moe()
    with torch.no_grad():
        before = model(INPUT_IDS).logits
        assert torch.equal(prepare(model)(INPUT_IDS).logits, before)
