"""Losses on routings: pure functions of stacked tensors.

L routed layers, T tokens, X experts, K picks, B samples.
Every token that is not padding counts, prompt and picture tokens as much as answers, the same way in every function;
`is_counted_T` says which. Counts f carry no gradient; probabilities P do. Every balance loss is 1 when routing is even,
whatever L, X and K, so that one weight means the same for each of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def pick_counts(expert_ids_LTK: Tensor, is_counted_T: Tensor, num_experts: int) -> Tensor:
    """[L, X] how many picks of counted tokens each expert got, fp32, no gradient."""
    picked_LTX = F.one_hot(expert_ids_LTK, num_experts).sum(2)
    return (picked_LTX * is_counted_T[:, None]).sum(1).float()


def balance_loss_layer(
    *, router_probs_LTX: Tensor, expert_ids_LTK: Tensor, is_counted_T: Tensor, sample_T: Tensor
) -> Tensor:
    """Mean over layers of X · Σ_x f_x · P_x, f the share of picks and P the mean probability over this rank's batch.

    Switch Transformer, 2101.03961, Eq. 4. `sample_T` is not used: all balance losses are called alike.
    """
    num_experts = router_probs_LTX.shape[-1]
    counts_LX = pick_counts(expert_ids_LTK, is_counted_T, num_experts)
    share_LX = counts_LX / counts_LX.sum(-1, keepdim=True).clamp(min=1)
    mean_probs_LX = (router_probs_LTX * is_counted_T[:, None]).sum(1) / is_counted_T.sum().clamp(min=1)
    return num_experts * (share_LX * mean_probs_LX).sum(-1).mean()


def balance_loss_global_batch(
    *, router_probs_LTX: Tensor, expert_ids_LTK: Tensor, is_counted_T: Tensor, sample_T: Tensor
) -> Tensor:
    """The layer loss with f counted, and P normalised, over the batches of all ranks (2501.11873).

    Balance within a micro-batch forbids specialisation when the micro-batch holds one domain; over the global batch it
    does not. f is all-reduced; it carries no gradient, so a plain all_reduce is enough. P is this rank's sum over the
    global token count, times the number of ranks: averaged over ranks, as data parallelism averages gradients, value
    and gradient equal those of the joined batch also when ranks hold different numbers of tokens. Without
    torch.distributed it is `balance_loss_layer`. All ranks must call it together. `sample_T` is not used.
    """
    num_experts = router_probs_LTX.shape[-1]
    counts_LX = pick_counts(expert_ids_LTK, is_counted_T, num_experts)
    num_tokens, num_ranks = is_counted_T.sum().float(), 1
    if dist.is_available() and dist.is_initialized():
        num_ranks = dist.get_world_size()
        sums = torch.cat([counts_LX.flatten(), num_tokens[None]])
        dist.all_reduce(sums)
        counts_LX, num_tokens = sums[:-1].view_as(counts_LX), sums[-1]
    share_LX = counts_LX / counts_LX.sum(-1, keepdim=True).clamp(min=1)
    probs_LX = (router_probs_LTX * is_counted_T[:, None]).sum(1) * (num_ranks / num_tokens.clamp(min=1))
    return num_experts * (share_LX * probs_LX).sum(-1).mean()


def balance_loss_sample(
    *, router_probs_LTX: Tensor, expert_ids_LTK: Tensor, is_counted_T: Tensor, sample_T: Tensor
) -> Tensor:
    """(1/B) Σ_i X · Σ_x mean_{l,t in i}(f_x) · mean_{l,t in i}(P_x): LLaVA-MoLE (2401.16160) as released, times X.

    The means pool all layers and all counted tokens of one sample. So every sample, of whatever domain, is pushed to
    use all experts evenly, while a layer that always takes the same expert goes unpunished when another makes up for
    it. Samples without a counted token are left out.
    """
    num_layers, _, num_experts = router_probs_LTX.shape
    num_samples = int(sample_T[-1]) + 1
    counted_T = is_counted_T.to(router_probs_LTX.dtype)
    tokens_B = counted_T.new_zeros(num_samples).index_add(0, sample_T, counted_T)

    def mean_BX(per_token_TX: Tensor, per_layer: int) -> Tensor:
        sums_BX = per_token_TX.new_zeros(num_samples, num_experts).index_add(0, sample_T, per_token_TX)
        return sums_BX / (tokens_B.clamp(min=1)[:, None] * num_layers * per_layer)

    picks_LTX = F.one_hot(expert_ids_LTK, num_experts).sum(2).to(counted_T.dtype)
    share_BX = mean_BX(picks_LTX.sum(0) * counted_T[:, None], expert_ids_LTK.shape[-1])
    probs_BX = mean_BX(router_probs_LTX.sum(0) * counted_T[:, None], 1)
    return num_experts * (share_BX * probs_BX).sum() / (tokens_B > 0).sum().clamp(min=1)


BALANCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "global_batch": balance_loss_global_batch,
    "layer": balance_loss_layer,
    "sample": balance_loss_sample,
}


def z_loss(*, router_logits_LTX: Tensor, is_counted_T: Tensor) -> Tensor:
    """Mean over layers and counted tokens of logsumexp(logits)²: keeps logits small (ST-MoE, 2202.08906, Eq. 5)."""
    squares_LT = router_logits_LTX.logsumexp(-1).square()
    return (squares_LT * is_counted_T).sum() / (is_counted_T.sum().clamp(min=1) * len(squares_LT))
