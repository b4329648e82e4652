"""The arithmetic of stacked low-rank experts: two fast paths and the slow loop they must equal.

T tokens, I input width, O output width, E experts, R rank of one expert, K picks, N real picks of all tokens.
F = Σ R, the ranks of all experts in a row: A_FI holds every expert's A, B_FO every expert's B transposed. With one A
for all experts (HydraLoRA, 2404.19245) A has R rows and B still F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm.routing import Routing, SortedPicks


def masked_experts(base_TO: Tensor, x_TI: Tensor, A_FI: Tensor, B_FO: Tensor, weights_TF: Tensor) -> Tensor:
    """base_t + Σ_e weights[t, e] · B_e A_e x_t, as two dense products over all ranks, unpicked ones masked out.

    No sorting, no scatter, no loop; the right choice for a handful of low-rank experts. It costs the same whatever was
    picked. weights_TF gives the weight of each rank's expert, scaling included; one row does for all tokens.
    The second product adds to the base output as it goes. Returns [T, O] in base_TO's type; without autocast x, A and B
    must be of one type, which may be another than base_TO's.
    """
    hidden_TF = x_TI @ A_FI.T
    if len(A_FI) < len(B_FO):
        hidden_TF = hidden_TF.repeat(1, len(B_FO) // len(A_FI))
    hidden_TF = hidden_TF * weights_TF.to(hidden_TF.dtype)
    return torch.addmm(base_TO.to(hidden_TF.dtype), hidden_TF, B_FO).to(base_TO.dtype)


def sorted_experts(
    base_TO: Tensor,
    x_TI: Tensor,
    A_FI: Tensor,
    B_FO: Tensor,
    picks: SortedPicks,
    weights_N: Tensor,
    ranks: list[int],
) -> Tensor:
    """The same over real picks alone, gathered in the order of their experts: null picks cost nothing.

    The order is found once a block and shared by its linears. The right choice for many or wide experts and for a high
    share of nulls. weights_N: weight of each pick, scaling included. Every expert's parameters are part of the graph
    whatever was picked, so that all ranks of a distributed run touch the same.
    """
    gathered_E = x_TI[picks.token_N].split(picks.counts_E)
    shared_A = len(A_FI) < len(B_FO)
    A_E = [A_FI] * len(ranks) if shared_A else A_FI.split(ranks)
    rows_NO = torch.cat([x @ A.T @ B for x, A, B in zip(gathered_E, A_E, B_FO.split(ranks), strict=True)])
    rows_NO = rows_NO * weights_N.to(rows_NO.dtype)[:, None]
    return base_TO.to(rows_NO.dtype).index_add(0, picks.token_N, rows_NO).to(base_TO.dtype)


def slow_experts(
    base_TO: Tensor,
    x_TI: Tensor,
    A_FI: Tensor,
    B_FO: Tensor,
    routing: Routing,
    ranks: list[int],
    scaling_E: list[float],
) -> Tensor:
    """The definition, one token and one pick at a time. Used by tests; read this first."""
    A_E = [A_FI] * len(ranks) if len(A_FI) < len(B_FO) else A_FI.split(ranks)
    B_E = B_FO.split(ranks)
    rows = []
    for token, (base_O, x_I) in enumerate(zip(base_TO, x_TI, strict=True)):
        y_O = base_O
        for pick, expert in enumerate(routing.expert_ids_TK[token].tolist()):
            if routing.is_taken_TK[token, pick] and expert < len(ranks):
                weight = routing.expert_weights_TK[token, pick] * scaling_E[expert]
                y_O = y_O + weight * (B_E[expert].T @ (A_E[expert] @ x_I))
        rows.append(y_O)
    return torch.stack(rows)
