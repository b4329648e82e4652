"""Routing mixed with that of neighbours at test time, without any training (after C3PO, 2504.07964): a dear reference.

For every question its neighbours are looked for, and at the chosen token the routers' probabilities are replaced by
(1 - α) times their own plus α times the neighbours' weighted mean. C3PO's gradient descent on the routing of each
question is not here.

B batch, S sequence, T = B·S tokens, X experts of a layer, N samples, R length of a routing vector, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor

from mllm.alignment.data import Batch
from mllm.alignment.neighbours import Neighbours
from mllm.alignment.routes import RoutedLayer, chosen_tokens
from mllm.common.errors import UserError
from mllm.mole.native_moe import NullRouter


def neighbours_mean(neighbours: Neighbours, vectors_NR: Tensor) -> Tensor:
    """Σ_j W_ij r_j of every sample that neighbours were looked for, [Q, R]; zeros where it has none."""
    gathered_QKR = vectors_NR[neighbours.ids_NK.clamp(min=0)]
    return torch.einsum("qk,qkr->qr", neighbours.weights_NK, gathered_QKR)


@contextmanager
def mixed_routing(
    layers: Sequence[RoutedLayer], target_BR: Tensor, chosen_BS: Tensor, sizes: Sequence[int], *, alpha: float = 0.5
) -> Iterator[None]:
    """While this lasts, a forward of a batch [B, S] mixes `target_BR` into the routing of the tokens chosen (> 0).

    Steps of decoding, which are of another size, and rows whose target is zero, are left alone. `sizes` are the
    layers' X.

    Raises UserError for routers whose scores are sigmoids (DeepSeek-V3): a mean of shares does not give them back.
    """
    chosen_T, row_T = (chosen_BS > 0).flatten(), torch.arange(len(chosen_BS)).repeat_interleave(chosen_BS.shape[1])
    with ExitStack() as undo:
        for layer, target_BX in zip(layers, target_BR.split(list(sizes), dim=1), strict=True):
            has_target_T = chosen_T & (target_BX.sum(1) > 0)[row_T]
            edit = _editor(has_target_T, target_BX[row_T], alpha)
            if isinstance(layer.router, NullRouter):
                if layer.router.family.scores is torch.sigmoid:
                    raise UserError("Routing can be mixed where routers use a softmax; this model's use sigmoids.")
                layer.router.edit_logits = edit
                undo.callback(setattr, layer.router, "edit_logits", None)
            else:
                hook = layer.router.router.register_forward_hook(lambda _, __, logits_TX, edit=edit: edit(logits_TX))
                undo.callback(hook.remove)
        yield


def _editor(chosen_T: Tensor, target_TX: Tensor, alpha: float) -> Callable[[Tensor], Tensor]:
    def edit(logits_TX: Tensor) -> Tensor:
        if len(logits_TX) != len(chosen_T):
            return logits_TX
        mixed_TX = (1 - alpha) * logits_TX.float().softmax(-1) + alpha * target_TX.to(logits_TX.device)
        return torch.where(chosen_T[:, None].to(logits_TX.device), mixed_TX.log().to(logits_TX.dtype), logits_TX)

    return edit


def mixing(
    layers: Sequence[RoutedLayer],
    targets_NR: Tensor,
    sizes: Sequence[int],
    *,
    token: str = "last",
    alpha: float = 0.5,
) -> Callable[[Sequence[int], Batch], AbstractContextManager]:
    """The `around` of `mllm.alignment.score`: each batch is scored with its rows' targets mixed in."""

    def around(rows: Sequence[int], batch: Batch) -> AbstractContextManager:
        inputs, labels_BS, _ = batch
        chosen_BS = chosen_tokens(labels_BS, inputs["attention_mask"], token)
        return mixed_routing(layers, targets_NR[list(rows)], chosen_BS, sizes, alpha=alpha)

    return around
