"""Activation checkpointing runs every block twice; nothing about routing may change."""

import pytest
import torch

from mllm.common.errors import UserError
from mllm.mole import routing_context, routing_loss
from mllm.routing import RoutingStats
from tests.mllm.mole.helpers import INPUT_IDS, gradients, tiny_mole


def step(use_reentrant, **config):
    """Loss, routing losses, counts and gradients of one training step."""
    model = tiny_mole(**config)
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    mask = torch.ones_like(INPUT_IDS)
    mask[0, :3] = 0
    loss = model(INPUT_IDS, attention_mask=mask, labels=INPUT_IDS).loss
    extra, parts = routing_loss(model)
    (loss + extra).backward()
    stats = RoutingStats()
    stats.update(routing_context(model))
    return loss.detach(), parts, stats.to_json(), gradients(model)


@pytest.mark.parametrize("gate", ["straight_through", "softmax", "none"])
def test_non_reentrant_checkpointing_gives_equal_losses_counts_and_gradients(gate):
    config = {"gate": gate, "top_k": 2, "z_loss_weight": 0.1, "balance_loss_weight": 0.5}
    plain, checkpointed = step(None, **config), step(False, **config)
    assert torch.equal(plain[0], checkpointed[0])
    assert plain[1] == checkpointed[1]
    assert plain[2] == checkpointed[2]
    assert plain[3].keys() == checkpointed[3].keys()
    for name, gradient in plain[3].items():
        torch.testing.assert_close(checkpointed[3][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_recomputation_in_backward_is_not_recorded():
    model = tiny_mole()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(INPUT_IDS, labels=INPUT_IDS).loss
    before = dict(routing_context(model).routings)
    loss.backward()
    after = routing_context(model).routings
    assert list(after) == ["layers.0.mlp", "layers.1.mlp"]
    assert all(after[layer] is routing for layer, routing in before.items())


def test_reentrant_checkpointing_is_refused_with_the_reason():
    with pytest.raises(UserError, match="use_reentrant=False"):
        step(True)
