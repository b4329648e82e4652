import math

import pytest
import torch

from mllm.routing import BALANCE_LOSSES, z_loss

COUNTED = torch.tensor([True, True, True, False])
SAMPLE = torch.tensor([0, 0, 1, 1])


def loss(kind, probs_LTX, ids_LTK, counted=None, sample=None):
    probs_LTX, ids_LTK = torch.as_tensor(probs_LTX), torch.as_tensor(ids_LTK)
    tokens = probs_LTX.shape[1]
    return BALANCE_LOSSES[kind](
        router_probs_LTX=probs_LTX,
        expert_ids_LTK=ids_LTK,
        is_counted_T=torch.ones(tokens, dtype=torch.bool) if counted is None else counted,
        sample_T=torch.zeros(tokens, dtype=torch.long) if sample is None else sample,
    )


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_even_routing_costs_one(kind):
    probs = torch.full((3, 4, 2), 0.5)
    ids = torch.tensor([0, 1, 0, 1]).view(1, 4, 1).expand(3, 4, 1)
    torch.testing.assert_close(loss(kind, probs, ids, sample=SAMPLE), torch.tensor(1.0))


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_collapsed_routing_costs_the_number_of_experts(kind):
    probs = torch.tensor([1.0, 0, 0]).expand(2, 4, 3)
    torch.testing.assert_close(loss(kind, probs, torch.zeros(2, 4, 1, dtype=torch.long)), torch.tensor(3.0))


@pytest.mark.parametrize("kind", ["layer", "global_batch"])
def test_the_layer_loss_by_hand_without_the_padded_token(kind):
    probs = [[[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.0, 1.0]]]
    ids = [[[0], [0], [1], [1]]]
    # f = (2/3, 1/3), P = (1.5/3, 1.5/3): 2 · (2/3 · 0.5 + 1/3 · 0.5) = 1
    torch.testing.assert_close(loss(kind, probs, ids, COUNTED), torch.tensor(1.0))
    # with the last token f = (1/2, 1/2), P = (1.5/4, 2.5/4): 1 as well, so other picks tell them apart
    ids = [[[0], [0], [0], [1]]]
    # f = (1, 0): 2 · 0.5 = 1; with the last token f = (3/4, 1/4): 2 · (0.75 · 0.375 + 0.25 · 0.625) = 0.875
    torch.testing.assert_close(loss(kind, probs, ids, COUNTED), torch.tensor(1.0))
    torch.testing.assert_close(loss(kind, probs, ids), torch.tensor(0.875))


def test_with_two_picks_shares_are_shares_of_picks():
    probs = [[[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]]
    # f = (2, 1, 1) / 4: 3 · (0.5 · 0.5 + 0.25 · 0.3 + 0.25 · 0.2) = 1.125
    torch.testing.assert_close(loss("layer", probs, [[[0, 1], [0, 2]]]), torch.tensor(1.125))


def test_the_sample_loss_by_hand_pools_the_layers_of_each_sample():
    probs = [[[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.0, 1.0]], [[0.4, 0.6], [0.2, 0.8], [0.3, 0.7], [1.0, 0.0]]]
    ids = [[[0], [0], [1], [1]], [[1], [1], [1], [0]]]
    # sample 0: f = (2/4, 2/4), P = (2.0/4, 2.0/4): 0.5
    # sample 1, its padded token left out: f = (0, 1), P = (0.2, 0.8): 0.8
    torch.testing.assert_close(loss("sample", probs, ids, COUNTED, SAMPLE), torch.tensor(2 * (0.5 + 0.8) / 2))


def test_a_sample_of_padding_alone_does_not_count():
    probs, ids = torch.rand(1, 4, 2).softmax(-1), torch.tensor([[[0], [1], [1], [1]]])
    only_first = torch.tensor([True, True, False, False])
    left = loss("sample", probs, ids, only_first, SAMPLE)
    torch.testing.assert_close(left, loss("sample", probs[:, :2], ids[:, :2]))


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_the_gradient_of_a_padded_token_is_zero_and_of_others_is_not(kind):
    probs = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
    ids = probs.detach().topk(1, dim=-1).indices
    loss(kind, probs, ids, COUNTED, SAMPLE).backward()
    assert not probs.grad[:, 3].any()
    assert probs.grad[:, :3].abs().sum(-1).all()


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_a_batch_of_padding_alone_costs_nothing_and_is_finite(kind):
    value = loss(kind, torch.rand(1, 2, 3), torch.zeros(1, 2, 1, dtype=torch.long), torch.tensor([False, False]))
    assert value == 0


def test_the_z_loss_is_the_mean_squared_logsumexp_of_counted_tokens():
    logits = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [50.0, 0.0]]])
    expected = (2 * math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 3
    assert z_loss(router_logits_LTX=logits, is_counted_T=COUNTED).item() == pytest.approx(expected)
