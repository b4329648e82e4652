"""Rows to align on: anything that makes batches by row number. B batch, S sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import LlavaProcessor

from mllm.data.collate import Collator
from mllm.data.conversation import Conversation
from mllm.data.template import IGNORED, ConversationEncoder

Batch = tuple[dict[str, Any], Tensor, list[str]]


class AlignmentData(Protocol):
    """What alignment reads. `studies.finetune.CachedSet` is one too."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """What the model reads, `input_ids` and `attention_mask` [B, S] among it; labels [B, S]; domain of each row."""


@dataclass(frozen=True)
class EncodedRows:
    """Conversations for a LLaVA, pictures opened when their row is asked for."""

    conversations: Sequence[Conversation]
    processor: LlavaProcessor
    max_length: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_encoder", ConversationEncoder(self.processor, self.max_length))
        object.__setattr__(self, "_collate", Collator(self.processor))

    def __len__(self) -> int:
        return len(self.conversations)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Padded on the right. Raises UserError and `ImageError`, naming the row, as the encoder does."""
        inputs = self._collate([self._encoder.encode(self.conversations[row]) for row in rows])
        domains, _ = inputs.pop("domains"), inputs.pop("wheres")
        return inputs, inputs.pop("labels"), domains


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids and labels (-100 where not supervised) for a language model; `domains[i]` is row i's task."""

    ids: Sequence[Tensor]
    labels: Sequence[Tensor]
    domains: Sequence[str]
    pad_token_id: int = 0
    side: Literal["left", "right"] = "right"

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Padded on `side`."""
        ids = [self.ids[row] for row in rows]
        inputs = {
            "input_ids": padded(ids, self.pad_token_id, self.side),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0, self.side),
        }
        labels_BS = padded([self.labels[row] for row in rows], IGNORED, self.side)
        return inputs, labels_BS, [self.domains[row] for row in rows]


def padded(rows: Sequence[Tensor], fill: float, side: str = "right") -> Tensor:
    """Rows [S_i, …] in one tensor [B, S, …]."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill, padding_side=side)
