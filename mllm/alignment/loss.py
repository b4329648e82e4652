"""What is added to the answers' loss (RoMA, 2511.07419, and what it is compared with): pure functions.

    L = CE(answer) + λ · scale · Reg

`scale` is CE / Reg at the start of training, so that λ = 1 means: the term weighs as much as the answers do. (With the
released λ = 0.8 and no scale the term is four hundred times smaller than CE.)

B batch, R length of a routing vector, K neighbours, L layers, X experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REGULARISERS = {
    "none": "the answers' loss alone",
    "neighbours": "Σ_i Σ_j W_ij ‖r_i - r_j‖², routing vectors drawn to those of successful neighbours (RoMA)",
    "contrast": "the same over the mean ‖r_i - r_k‖² of the batch's rows: no gain by routing all alike (ours)",
    "initial": "‖W - W₀‖² / ‖W₀‖², routers kept near where they began",
    "entropy": "the routers' entropy at the chosen token, made small",
}
TARGETS = {
    "live": "r_i and r_j both get gradients",
    "stop": "r_j by the present weights, without gradient",
    "table": "r_j as it was when the epoch began",
    "detached_both": "neither gets a gradient, as in RoMA's released code: nothing but CE is left",
}


def neighbour_loss(*, r_BR: Tensor, r_BKR: Tensor, weights_BK: Tensor) -> Tensor:
    """Mean over i of Σ_j W_ij ‖r_i - r_j‖². A neighbour that is not there weighs 0."""
    squared_BK = (r_BR[:, None] - r_BKR).square().sum(-1)
    return (weights_BK * squared_BK).sum(1).mean()


def contrast_loss(*, r_BR: Tensor, r_BKR: Tensor, weights_BK: Tensor) -> Tensor:
    """`neighbour_loss` over the mean squared distance of two different rows of the batch.

    The distance to neighbours alone is least where a router sends every sample the same way; this quotient is about 1
    there, and small only where neighbours are nearer than others. A batch of one row has nothing to compare: 0.
    """
    if len(r_BR) < 2:
        return r_BR.sum() * 0
    spread = 2 * r_BR.var(0).sum()  # the mean over pairs of different rows
    return neighbour_loss(r_BR=r_BR, r_BKR=r_BKR, weights_BK=weights_BK) / spread.clamp(min=1e-12)


def entropy_loss(r_BR: Tensor, sizes_L: Sequence[int]) -> Tensor:
    """Mean over rows and layers of the entropy, in nats, of the probabilities in r; `sizes_L` are the layers' X."""
    entropies = [-torch.special.xlogy(p_BX, p_BX).sum(-1) for p_BX in r_BR.split(list(sizes_L), dim=1)]
    return torch.stack(entropies).mean()


def initial_loss(weights: Sequence[Tensor], initial: Sequence[Tensor]) -> Tensor:
    """‖W - W₀‖² / ‖W₀‖² over all weights together: 0 at the start, and 1 where they have moved by their own length."""
    moved = sum((now - then).square().sum() for now, then in zip(weights, initial, strict=True))
    return moved / sum(then.square().sum() for then in initial)
