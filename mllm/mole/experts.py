"""The arithmetic of stacked low-rank experts: the fast path and the slow loop it must equal.

T tokens, I input width, O output width, E experts, R rank of one expert, K picks.
A_ERI holds every expert's A, B_ERO every expert's B transposed, so that both are one matrix over all E·R ranks without
a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fast_experts(base_TO: Tensor, x_TI: Tensor, A_ERI: Tensor, B_ERO: Tensor, weights_TE: Tensor) -> Tensor:
    """base_t + Σ_e weights[t, e] · B_e A_e x_t, as two dense products over all ranks, unpicked ones masked out.

    No sorting, no scatter, no loop; every rank of a distributed run touches the same parameters whatever was routed, so
    ZeRO-3 cannot hang on an unused expert. The right choice for a handful of low-rank experts.
    The second product adds to the base output as it goes. weights_TE may be one row for all tokens. Returns [T, O] in
    base_TO's type; without autocast x, A and B must be of one type, which may be another than base_TO's.
    """
    num_experts, rank, _ = A_ERI.shape
    hidden_TER = (x_TI @ A_ERI.flatten(0, 1).T).unflatten(1, (num_experts, rank))
    hidden_TER = hidden_TER * weights_TE.to(hidden_TER.dtype).unsqueeze(-1)
    hidden_TF = hidden_TER.flatten(1)
    return torch.addmm(base_TO.to(hidden_TF.dtype), hidden_TF, B_ERO.flatten(0, 1)).to(base_TO.dtype)


def slow_experts(
    base_TO: Tensor, x_TI: Tensor, A_ERI: Tensor, B_ERO: Tensor, expert_ids_TK: Tensor, expert_weights_TK: Tensor
) -> Tensor:
    """The definition, one token and one pick at a time. Used by tests; read this first."""
    rows = []
    for base_O, x_I, ids_K, weights_K in zip(base_TO, x_TI, expert_ids_TK, expert_weights_TK, strict=True):
        y_O = base_O
        for expert, weight in zip(ids_K.tolist(), weights_K, strict=True):
            y_O = y_O + weight * (B_ERO[expert].T @ (A_ERI[expert] @ x_I))
        rows.append(y_O)
    return torch.stack(rows)
