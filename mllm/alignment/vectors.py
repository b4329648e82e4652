"""The routing vectors of many samples at once, as a table. N samples, R numbers of a routing vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mllm.alignment.data import AlignmentData
from mllm.alignment.routes import RoutedLayer, chosen_tokens, routing_vectors
from mllm.alignment.tail import run
from mllm.routing import routing_context


@torch.no_grad()
def sample_vectors(
    model: nn.Module,
    data: AlignmentData,
    layers: Sequence[RoutedLayer],
    rows: Sequence[int] | None = None,
    *,
    token: str = "last",
    space: str = "probs",
    batch_size: int = 32,
) -> Tensor:
    """r of each row, [N, R] fp32 on the CPU, by the model's present weights; no head is run."""
    rows = range(len(data)) if rows is None else rows
    names, vectors = [layer.name for layer in layers], []
    for start in range(0, len(rows), batch_size):
        inputs, labels_BS, _ = data.batch(rows[start : start + batch_size])
        run(model, inputs, None)
        context = routing_context(model)
        weights_BS = chosen_tokens(labels_BS, inputs["attention_mask"], token).to(context.sample_T.device)
        vectors.append(routing_vectors(context, names, weights_BS, space=space).cpu())
    return torch.cat(vectors)


def vector_sizes(model: nn.Module, layers: Sequence[RoutedLayer]) -> list[int]:
    """X of each layer: how many numbers of r are its own. Asks the last forward."""
    context = routing_context(model)
    return [context.routings[layer.name].router_probs_TX.shape[1] for layer in layers]
