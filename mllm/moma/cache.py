"""What a Moma model remembers of a token beside its keys and values: in transformers' own cache, behind its layers.

B batch, S tokens of this call, L those of earlier calls too. In the shape of keys, whatever is kept is cropped and
reordered (beam search) as keys are.
"""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mllm.common.errors import UserError
from mllm.moma.config import MomaConfig


def ids_layer(config: MomaConfig) -> int:
    """Number of the layer that keeps token ids, for `image_side`."""
    return config.num_hidden_layers


def depth_layer(config: MomaConfig, layer: int) -> int:
    """Number of the layer that keeps which tokens a layer with a depth router has worked on."""
    return config.num_hidden_layers + 1 + layer // 2


def remember(past: Cache, layer: int, values_BS: Tensor) -> Tensor:
    """Adds values of this call's tokens; [B, L] those of all tokens so far. Raises UserError for other caches."""
    if not isinstance(past, DynamicCache):
        raise UserError(f"image_side and mixture_of_depths keep a DynamicCache only, got {type(past).__name__}.")
    while len(past.layers) <= layer:
        past.layers.append(DynamicLayer())
    values_B1S1 = values_BS[:, None, :, None]
    return past.update(values_B1S1, values_B1S1, layer)[0][:, 0, :, 0]
