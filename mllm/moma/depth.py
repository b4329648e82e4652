"""Attention of a layer that works on some tokens only (mixture of depths, 2404.02258).

B batch, S sequence, C most tokens chosen in a row, K keys, D width. Only chosen tokens ask, and only chosen ones are
looked at, in earlier calls with a cache too. Documents packed into one row do not see each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mllm.common.errors import UserError
from mllm.moma.cache import depth_layer, remember

Rotary = tuple[Tensor, Tensor]


def attend_chosen(
    attention: nn.Module,
    hidden_BSD: Tensor,
    is_chosen_BS: Tensor,
    position_embeddings: Rotary,
    past_key_values: Cache | None,
    document_BS: Tensor | None = None,
) -> Tensor:
    """Llama's attention among chosen tokens: [B, S, D], anything where a token was not chosen.

    document_BS: int64, the document of its row that a token belongs to; None where a row is one.

    Without a cache the chosen tokens of each row are moved together first, so that the others cost nothing. With one,
    all are computed and masked, so that every layer's cache has the same length.
    """
    if past_key_values is not None:
        return _attend_masked(attention, hidden_BSD, is_chosen_BS, position_embeddings, past_key_values)
    longest = max(1, int(is_chosen_BS.sum(1).max()))
    index_BC1 = (~is_chosen_BS).byte().argsort(dim=1, stable=True)[:, :longest, None]

    def gather(values: Tensor) -> Tensor:
        values_BSF = values.expand(len(hidden_BSD), -1, -1)
        return values_BSF.gather(1, index_BC1.expand(-1, -1, values_BSF.shape[-1]))

    is_key_BC = is_chosen_BS.gather(1, index_BC1[..., 0])
    rotary = tuple(gather(values) for values in position_embeddings)
    document_BC = None if document_BS is None else document_BS.gather(1, index_BC1[..., 0])
    mask = causal_mask(is_key_BC, longest, attention.config._attn_implementation, hidden_BSD.dtype, document_BC)
    output_BCD, _ = attention(gather(hidden_BSD), position_embeddings=rotary, attention_mask=mask)
    return torch.zeros_like(hidden_BSD).scatter(1, index_BC1.expand_as(output_BCD), output_BCD.to(hidden_BSD.dtype))


def _attend_masked(
    attention: nn.Module, hidden_BSD: Tensor, is_chosen_BS: Tensor, position_embeddings: Rotary, past: Cache
) -> Tensor:
    # Kept in the cache: which tokens the layer has worked on.
    is_key_BK = remember(past, depth_layer(attention.config, attention.layer_idx), is_chosen_BS)
    mask = causal_mask(is_key_BK, hidden_BSD.shape[1], attention.config._attn_implementation, hidden_BSD.dtype)
    output_BSD, _ = attention(
        hidden_BSD, position_embeddings=position_embeddings, attention_mask=mask, past_key_values=past
    )
    return output_BSD


def causal_mask(
    is_key_BK: Tensor,
    num_queries: int,
    implementation: str,
    dtype: torch.dtype,
    document_BK: Tensor | None = None,
) -> Tensor:
    """[B, 1, S, K] for the last S of K positions: earlier keys of the same document, and always itself, so that no row
    is without a key.

    Raises UserError for an attention that takes no such mask.
    """
    if implementation not in ("sdpa", "eager"):
        raise UserError(f'mixture_of_depths runs with attn_implementation "sdpa" or "eager", got {implementation!r}.')
    key_K = torch.arange(is_key_BK.shape[1], device=is_key_BK.device)
    query_S1 = key_K[-num_queries:, None]
    sees_B1SK = (is_key_BK[:, None, None] & (key_K < query_S1)) | (key_K == query_S1)
    if document_BK is not None:
        sees_B1SK = sees_B1SK & (document_BK[:, None, -num_queries:, None] == document_BK[:, None, None])
    if implementation == "sdpa":
        return sees_B1SK
    return torch.zeros_like(sees_B1SK, dtype=dtype).masked_fill(~sees_B1SK, torch.finfo(dtype).min)
