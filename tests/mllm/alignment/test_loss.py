"""The regularisers, against their definitions and finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from mllm.alignment.loss import contrast_loss, entropy_loss, initial_loss, neighbour_loss


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_neighbour_loss_is_its_definition_in_a_loop():
    r, others, weights = drawn(4, 6), drawn(4, 3, 6), drawn(4, 3)
    wanted = sum(weights[i, j] * ((r[i] - others[i, j]) ** 2).sum() for i in range(4) for j in range(3)) / 4
    torch.testing.assert_close(neighbour_loss(r_BR=r, r_BKR=others, weights_BK=weights), wanted)


def test_neighbour_loss_has_the_gradient_of_finite_differences_in_both_vectors():
    r, others, weights = drawn(3, 4).requires_grad_(), drawn(3, 2, 4).requires_grad_(), drawn(3, 2)
    assert gradcheck(lambda a, b: neighbour_loss(r_BR=a, r_BKR=b, weights_BK=weights), (r, others))


def test_contrast_is_the_quotient_of_distances_and_of_its_gradient_are_finite_differences():
    r, others, weights = drawn(4, 6).requires_grad_(), drawn(4, 3, 6).requires_grad_(), drawn(4, 3)
    pairs = [((r[i] - r[k]) ** 2).sum() for i in range(4) for k in range(4) if i != k]
    wanted = neighbour_loss(r_BR=r, r_BKR=others, weights_BK=weights) / (sum(pairs) / len(pairs))
    torch.testing.assert_close(contrast_loss(r_BR=r, r_BKR=others, weights_BK=weights), wanted)
    assert gradcheck(lambda a, b: contrast_loss(r_BR=a, r_BKR=b, weights_BK=weights), (r, others))


def test_contrast_gains_nothing_where_all_vectors_shrink_together():
    r, others, weights = drawn(4, 6), drawn(4, 3, 6), drawn(4, 3)
    whole, half = (contrast_loss(r_BR=s * r, r_BKR=s * others, weights_BK=weights) for s in (1.0, 0.5))
    torch.testing.assert_close(whole, half)
    assert contrast_loss(r_BR=r[:1], r_BKR=others[:1], weights_BK=weights[:1]) == 0


def test_entropy_and_distance_have_the_gradient_of_finite_differences():
    r, weight = drawn(3, 5).add(0.1).requires_grad_(), drawn(3, 4).requires_grad_()
    assert gradcheck(lambda a: entropy_loss(a, [2, 3]), r)
    assert gradcheck(lambda a: initial_loss([a], [drawn(4, 3).T]), weight)


def test_a_neighbour_that_is_not_there_does_not_count():
    r, others = drawn(2, 4), drawn(2, 2, 4)
    alone = neighbour_loss(r_BR=r, r_BKR=others[:, :1], weights_BK=torch.ones(2, 1))
    assert neighbour_loss(r_BR=r, r_BKR=others, weights_BK=torch.tensor([[1.0, 0.0]] * 2)) == alone


def test_entropy_is_nothing_for_a_certain_router_and_log_x_for_an_even_one():
    certain, even = torch.tensor([[1.0, 0.0]]), torch.full((1, 4), 0.25)
    assert entropy_loss(certain, [2]) == 0
    assert entropy_loss(even, [4]).item() == pytest.approx(torch.tensor(4.0).log().item())


def test_distance_counts_in_the_weights_own_length():
    weight = drawn(3, 4)
    assert initial_loss([weight], [weight]) == 0
    assert initial_loss([2 * weight], [weight]).item() == pytest.approx(1.0)
