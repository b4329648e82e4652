"""Samples of different lengths to one batch. B batch, S sequence, N pictures."""

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import ProcessorMixin

from mllm.data.template import IGNORED, blank_pixels


class Collator:
    """Pads samples of `ConversationEncoder` to a batch.

    A batch without any picture gets one blank one, whose places are padding: attention 0, labels -100. Tower and
    projector then run in every step and on every rank, which ZeRO and data parallelism wait for, and since nothing
    attends to those places the loss is that of the text alone and the projector's gradient exactly zero.
    """

    def __init__(self, processor: ProcessorMixin, side: Literal["right", "left"] = "right") -> None:
        """`side` is where padding goes: right for training, left for generation."""
        tokenizer = processor.tokenizer
        self.side = side
        self.pad_token_id: int = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        self._blank_pixels = blank_pixels(processor)
        places = processor.replace_image_token({"pixel_values": self._blank_pixels}, image_idx=0)
        self._blank_ids = torch.tensor(tokenizer(places, add_special_tokens=False)["input_ids"])

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            samples: what `ConversationEncoder.encode`, `encode_prompt` or `EncodedMixture` returned.

        Returns:
            input_ids, labels, attention_mask: int64 `[B, S]`.
            pixel_values: float32 `[N, 3, H, W]`, N at least 1, in the order of the rows.
            domains, wheres: lists of B texts, not for the model.
            bad_rows: what the samples tell of bad rows, only where there is something to tell.
        """
        pixel_values = torch.cat([sample["pixel_values"] for sample in samples])
        ids = [sample["input_ids"] for sample in samples]
        fill = torch.full((self._width(ids, blank=not len(pixel_values)),), self.pad_token_id)
        batch = {
            "input_ids": self._pad(ids, fill),
            "labels": self._pad([sample["labels"] for sample in samples], torch.full_like(fill, IGNORED)),
            "attention_mask": self._pad([sample["attention_mask"] for sample in samples], torch.zeros_like(fill)),
            "pixel_values": pixel_values,
        }
        if not len(pixel_values):
            batch["pixel_values"] = self._blank_pixels
            row = min(range(len(ids)), key=lambda index: len(ids[index]))
            places = slice(len(ids[row]), None) if self.side == "right" else slice(None, -len(ids[row]))
            batch["input_ids"][row, places][: len(self._blank_ids)] = self._blank_ids
        batch["domains"] = [sample["domain"] for sample in samples]
        batch["wheres"] = [sample["where"] for sample in samples]
        bad_rows = [bad for sample in samples for bad in sample.get("bad_rows", [])]
        if bad_rows:
            batch["bad_rows"] = bad_rows
        return batch

    def _width(self, ids: list[Tensor], *, blank: bool) -> int:
        """Length of the longest row, or of the shortest with a blank picture's places behind it."""
        lengths = [len(row) for row in ids]
        return max(max(lengths), min(lengths) + len(self._blank_ids)) if blank else max(lengths)

    def _pad(self, rows: list[Tensor], fill: Tensor) -> Tensor:
        """Rows `[S_i]` over copies of `fill` `[S]`."""
        padded = fill.repeat(len(rows), 1)
        for index, row in enumerate(rows):
            padded[index, slice(len(row)) if self.side == "right" else slice(len(fill) - len(row), None)] = row
        return padded
