"""Documents of text and pictures, arranged, packed into rows of one length, and kept on disk.

R rows, S tokens of a row, P codes of a picture. A row is full of documents: no padding. The last one is cut where the
row ends and stands whole at the start of the next, so every document is read from its beginning. `position_ids` count
from 0 in each, which keeps their attention apart in transformers (no attention_mask, no cache).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from mllm.common.errors import UserError
from mllm.data.template import IGNORED
from mllm.moma.processor import MomaProcessor

FORMS = ("image_to_text", "text_to_image", "interleaved", "text", "image")
# What a token is predicted from: its own modality alone, or the other one before it in its document.
DIRECTIONS = ("text", "image", "image_to_text", "text_to_image")
UNCOUNTED = -1  # the first token of a document, markers and ends: learned, but of no direction
ROWS_A_SHARD = 8192


class Sample(NamedTuple):
    """A picture's codes int64 [P] and the token ids of what is said of it."""

    codes: Tensor
    caption: list[int]


# -- documents ---------------------------------------------------------------------------------------------------------


def documents(
    samples: Iterable[Sample],
    processor: MomaProcessor,
    *,
    weights: Mapping[str, float],
    image_share: float | None,
    seed: int,
) -> Iterator[list[int]]:
    """Token ids of documents, each sample in one: a picture then its text, the reverse, two or three such pairs in one
    document (interleaved), or one of the two alone.

    Args:
        weights: how often each form of FORMS comes, relative to each other.
        image_share: of image codes among codes and words; None leaves it as the forms make it. Where pictures fall
            behind it, the next comes without its text, where they are ahead the next text without its picture.
        seed: of the forms.

    Raises UserError for unknown forms and for a share that is none.
    """
    if unknown := [form for form in weights if form not in FORMS]:
        raise UserError(f"A form of documents is one of {', '.join(FORMS)}; got {unknown[0]!r}.")
    if image_share is not None and not 0 < image_share < 1:
        raise UserError(f"image_share is between 0 and 1, got {image_share}.")
    rng, rest, codes, words = Random(f"documents/{seed}"), iter(samples), 0, 0
    for sample in rest:
        (form,) = rng.choices(list(weights), list(weights.values()))
        if image_share is not None:
            form = steered(form, sample, image_share * (codes + words) - codes, image_share)
        group = [sample]
        if form == "interleaved":
            group += [more for _, more in zip(range(rng.randint(1, 2)), rest, strict=False)]
        codes += sum(len(each.codes) for each in group if form != "text")
        words += sum(len(each.caption) for each in group if form != "image")
        tokenizer = processor.tokenizer
        pieces = pieces_of(form, group, processor, picture_first=rng.random() < 0.5)
        yield [tokenizer.bos_token_id, *(token for piece in pieces for token in piece), tokenizer.eos_token_id]


def steered(form: str, sample: Sample, missing: float, image_share: float) -> str:
    """The form, or the one of picture or text alone that brings the stream's share of codes back.

    missing: codes that the stream so far is short of; negative where it has too many.
    """
    if missing >= (1 - image_share) * len(sample.codes):
        return "image"
    return "text" if -missing >= image_share * len(sample.caption) else form


def pieces_of(form: str, group: list[Sample], processor: MomaProcessor, *, picture_first: bool) -> list[list[int]]:
    """Ids of a document's parts; `picture_first` decides for an interleaved one."""
    pictures = [processor.picture_ids(sample.codes) for sample in group]
    texts = [sample.caption for sample in group]
    if form in ("text", "image"):
        return texts if form == "text" else pictures
    picture_first = form == "image_to_text" or (form == "interleaved" and picture_first)
    pairs = zip(pictures, texts, strict=True) if picture_first else zip(texts, pictures, strict=True)
    return [piece for pair in pairs for piece in pair]


# -- rows --------------------------------------------------------------------------------------------------------------


def pack(stream: Iterable[list[int]], length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """int32 [S] input_ids and position_ids of each full row; what is left at the end fills no row and is dropped.

    A document longer than a row is cut to its beginning.
    """
    ids: list[int] = []
    positions: list[int] = []
    for document in stream:
        while True:
            room = length - len(ids)
            ids += document[:room]
            positions += range(min(room, len(document)))
            if len(ids) < length:
                break
            yield np.array(ids, np.int32), np.array(positions, np.int32)
            was_whole = len(document) <= room or room == length
            ids, positions = [], []
            if was_whole:
                break


def directions(ids_BS: Tensor, position_ids_BS: Tensor, processor: MomaProcessor) -> Tensor:
    """int64 [B, S] index into DIRECTIONS of what predicts each token, or UNCOUNTED.

    A word after a picture of its document is image_to_text, a code after a word text_to_image.
    """
    is_code = (ids_BS >= processor.image_token_start) & (
        ids_BS < processor.image_token_start + processor.image_tokenizer.codebook_size
    )
    is_word = (ids_BS < processor.num_words) & (position_ids_BS > 0) & (ids_BS != processor.tokenizer.eos_token_id)
    after_code, after_word = _seen(is_code, position_ids_BS), _seen(is_word, position_ids_BS)
    directions_BS = torch.full_like(ids_BS, UNCOUNTED)
    directions_BS[is_word] = torch.where(after_code, 2, 0)[is_word]
    directions_BS[is_code] = torch.where(after_word, 3, 1)[is_code]
    return directions_BS


def _seen(is_it_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
    """Whether such a token stands earlier in the same document."""
    place_BS = torch.arange(is_it_BS.shape[1]).expand_as(is_it_BS)
    last_BS = torch.where(is_it_BS, place_BS, -1).cummax(1).values
    return last_BS >= place_BS - position_ids_BS


class PackedRows(Dataset):
    """Rows on disk, as batches of a language model want them; what a run's order of samples is drawn from."""

    def __init__(self, ids_RS: np.ndarray, position_ids_RS: np.ndarray) -> None:
        self.ids_RS, self.position_ids_RS = ids_RS, position_ids_RS

    @classmethod
    def read(cls, folder: Path, split: str) -> PackedRows:
        """The shards of a split, in order. Raises UserError where there are none."""
        shards = [load_file(path) for path in sorted(folder.glob(f"{split}-*.safetensors"))]
        if not shards:
            raise UserError(f"{folder} holds no rows of the split {split!r}.")
        return cls(*(np.concatenate([shard[key] for shard in shards]) for key in ("input_ids", "position_ids")))

    def __len__(self) -> int:
        return len(self.ids_RS)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids_S, position_ids_S = (torch.from_numpy(rows[row]).long() for rows in (self.ids_RS, self.position_ids_RS))
        return {
            "input_ids": ids_S,
            "position_ids": position_ids_S,
            "labels": ids_S.masked_fill(position_ids_S == 0, IGNORED),
        }

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """input_ids, position_ids and labels, [B, S] each; a document's first token is predicted from nothing."""
        samples = [self[row] for row in rows]
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Row numbers in the order of an epoch."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))


def write_rows(stream: Iterable[list[int]], folder: Path, split: str, *, length: int, rows: int | None = None) -> int:
    """Packs documents into shards `<split>-00000.safetensors` …; each appears whole or not at all.

    Stops after `rows` rows if given. Returns how many were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    written = shard = 0
    for packed in pack(stream, length):
        pending.append(packed)
        is_last = written + len(pending) == rows
        if len(pending) == ROWS_A_SHARD or is_last:
            _write_shard(pending, folder / f"{split}-{shard:05d}.safetensors")
            written, shard, pending = written + len(pending), shard + 1, []
        if is_last:
            break
    if pending:
        _write_shard(pending, folder / f"{split}-{shard:05d}.safetensors")
    return written + len(pending)


def _write_shard(pending: list[tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    ids, positions = (np.stack(columns) for columns in zip(*pending, strict=True))
    partial = path.with_suffix(".partial")
    save_file({"input_ids": ids, "position_ids": positions}, partial)
    os.replace(partial, path)
