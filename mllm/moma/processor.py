"""Text and pictures as one vocabulary: words, two markers, image codes; and the folder that keeps them with a model.

W words of the text tokenizer, P codes of a picture. Ids: 0 .. W-1 words, W begin and W+1 end of a picture, codes after.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mllm.common.errors import UserError
from mllm.data.special_tokens import Reply, SpecialTokens
from mllm.moma.config import MomaConfig
from mllm.moma.image_tokens import ImageTokenizer

IMAGE_TOKENIZER = "image_tokenizer"  # folder inside a model's folder

Part = str | Tensor  # text, or a picture's codes int64 [P]


class MomaProcessor:
    """What stands between documents and token ids.

    `num_words` W is the tokenizer's length, or more where a language model's embedding table is longer.
    Raises UserError for a text tokenizer without begin and end of sequence.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_tokenizer: ImageTokenizer, num_words: int | None = None
    ) -> None:
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise UserError("The text tokenizer needs a begin and an end of sequence (bos_token, eos_token); set both.")
        self.tokenizer, self.image_tokenizer = tokenizer, image_tokenizer
        self._special = SpecialTokens(tokenizer)
        self._reply = Reply(tokenizer, self._special.hidden())
        self.num_words = num_words or len(tokenizer)
        self.begin_image_id, self.end_image_id = self.num_words, self.num_words + 1
        self.image_token_start = self.num_words + 2

    @property
    def config_fields(self) -> dict[str, Any]:
        """The fields of MomaConfig that follow from the vocabulary."""
        pad = self.tokenizer.pad_token_id
        return {
            "vocab_size": self.image_token_start + self.image_tokenizer.codebook_size,
            "codebook_size": self.image_tokenizer.codebook_size,
            "image_token_start": self.image_token_start,
            "begin_image_token_id": self.begin_image_id,
            "end_image_token_id": self.end_image_id,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.eos_token_id if pad is None else pad,
        }

    def check(self, config: MomaConfig) -> None:
        """Raises UserError if a model was made for another vocabulary."""
        for field in ("vocab_size", "image_token_start", "begin_image_token_id", "end_image_token_id"):
            expected, found = self.config_fields[field], getattr(config, field)
            if expected != found:
                raise UserError(
                    f"The model has {field}={found}, text and image tokenizer together {expected}: use those that it "
                    "was trained with."
                )
        if config.image_side not in (0, self.image_tokenizer.side):
            raise UserError(
                f"The model has image_side={config.image_side}, the image tokenizer makes {self.image_tokenizer.side} "
                "tokens a side: use the one that it was trained with, or image_side 0."
            )

    # -- documents and ids ---------------------------------------------------------------------------------------------

    def picture_ids(self, codes_P: Tensor) -> list[int]:
        """A picture between its markers."""
        return [self.begin_image_id, *(codes_P + self.image_token_start).tolist(), self.end_image_id]

    def text_ids(self, text: str) -> list[int]:
        """Text without begin and end of sequence, and without any that the text spells: "</s>" is four characters."""
        return self._special.text_ids(text)

    def open_ids(self, parts: Sequence[Part]) -> list[int]:
        """A document from its beginning, to go on with."""
        pieces = [self.text_ids(part) if isinstance(part, str) else self.picture_ids(part) for part in parts]
        return [self.tokenizer.bos_token_id, *(token for piece in pieces for token in piece)]

    def document_ids(self, parts: Sequence[Part]) -> list[int]:
        """A whole document, its end included."""
        return [*self.open_ids(parts), self.tokenizer.eos_token_id]

    def codes(self, ids: Tensor) -> Tensor:
        """The image codes among ids, in order, of whichever picture."""
        end = self.image_token_start + self.image_tokenizer.codebook_size
        return ids[(ids >= self.image_token_start) & (ids < end)] - self.image_token_start

    def text(self, ids: Tensor) -> str:
        """The words among ids."""
        return self._reply.decode(ids[ids < self.num_words]).strip()

    # -- folders -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Both tokenizers, into a model's folder."""
        self.tokenizer.save_pretrained(folder)
        self.image_tokenizer.save_pretrained(Path(folder, IMAGE_TOKENIZER))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MomaProcessor:
        """From the folder of a Moma model. Raises UserError where it holds none, or lacks a tokenizer."""
        path = Path(folder, "config.json")
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if config.get("model_type") != MomaConfig.model_type:
            raise UserError(f"{folder} holds no Moma model; give the folder model/ of a pretrain_moma run.")
        if not Path(folder, "tokenizer_config.json").is_file():
            raise UserError(f"{folder} has no text tokenizer; save a MomaProcessor there.")
        image_tokenizer = ImageTokenizer.from_pretrained(Path(folder, IMAGE_TOKENIZER))
        return cls(AutoTokenizer.from_pretrained(folder), image_tokenizer, config["begin_image_token_id"])


def as_batch(ids: list[int]) -> Tensor:
    """int64 [1, S]."""
    return torch.tensor([ids])
