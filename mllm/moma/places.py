"""Where in its picture an image token stands, as learned embeddings of row and column (DALL·E, 2102.12092).

Rotary positions tell how far apart two tokens are; what a caption says of "the top left" asks for the place itself.
B batch, S sequence, L tokens so far (S and those cached), D width, G tokens a side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm.moma.config import MomaConfig


class PlaceEmbeddings(nn.Module):
    """Row and column of image tokens; nothing for words, markers, and codes farther than G·G from a begin."""

    def __init__(self, config: MomaConfig) -> None:
        super().__init__()
        self.side, self.begin = config.image_side, config.begin_image_token_id
        self.rows = nn.Embedding(self.side, config.hidden_size)
        self.columns = nn.Embedding(self.side, config.hidden_size)

    def forward(self, place_BS: Tensor) -> Tensor:
        """[B, S, D] for places as `places` gives them."""
        is_inside_BS = (place_BS >= 0) & (place_BS < self.side**2)
        place_BS = place_BS.where(is_inside_BS, 0)
        embedded_BSD = self.rows(place_BS // self.side) + self.columns(place_BS % self.side)
        return embedded_BSD * is_inside_BS[..., None]


def places(ids_BL: Tensor, begin: int, is_image_BL: Tensor) -> Tensor:
    """int64 [B, L] image tokens between the last begin of a picture and each image token; -1 for other tokens, and
    where no picture has begun in the row.
    """
    index_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    begin_BL = torch.where(ids_BL == begin, index_L, -1).cummax(1).values
    return torch.where(is_image_BL & (begin_BL >= 0), index_L - begin_BL - 1, -1)
