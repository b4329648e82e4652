"""Rows, scenes and texts to token ids, once, and to batches that read a picture once for all that is asked of it.

A packed row is a picture's tokens and, behind them, several questions with their answers. Each sees the picture and
itself, at the positions it would have alone, so the loss is that of as many rows of one question each. P picture
tokens with what goes before them, S tokens, B rows.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from zlib import crc32

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from data_recipes.miniworld import DOMAINS, NEUTRAL, draw_scene
from mllm.data.conversation import IMAGE_PLACE, Turn
from mllm.data.template import IGNORED, ConversationEncoder
from studies.smol.plan import LICENCES, QUESTIONS, SCENES, SEED, SOURCES, VALIDATION, Stage

SHORT_ANSWER = "Answer the question using a single word or phrase."
LONGEST = 8  # questions packed behind one picture


@dataclass(frozen=True)
class Branch:
    """One question and its answer, behind a picture or alone."""

    picture: str  # key of its features; empty for text alone
    source: str
    kind: str  # "caption", "question", "speech"
    head: list[int]  # ids up to the picture's last token; the same for all questions of it
    ids: list[int]  # what follows
    answer: int  # how many of them, at the end, are supervised
    qtype: str = ""


def is_held_out(picture: str) -> bool:
    """Whether a picture of train is for validation."""
    return crc32(picture.encode()) % VALIDATION == 0


class Encoder:
    """Turns to branches, through the template that chat and evaluation use."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self._encoder = ConversationEncoder(processor)
        self._image_id = processor.image_token_id
        self._blank = Image.new("RGB", (8, 8))

    def __call__(self, question: str, answer: str, *, picture: str, source: str, kind: str, qtype: str = "") -> Branch:
        text = question.replace(IMAGE_PLACE, "").strip()
        turns = [Turn("user", f"{IMAGE_PLACE}\n{text}" if picture else text), Turn("assistant", answer)]
        sample = self._encoder.encode_turns(turns, [self._blank] if picture else [], where=picture or source)
        ids, labels = sample["input_ids"], sample["labels"]
        places = (ids == self._image_id).nonzero()
        start = int(places[-1]) + 1 if picture else 0
        end = int((labels != IGNORED).nonzero()[-1]) + 1  # what the template puts behind the answer is left out
        return Branch(
            picture, source, kind, ids[:start].tolist(), ids[start:end].tolist(),
            int((labels != IGNORED).sum()), qtype,
        )  # fmt: skip


def real_branches(folder: Path, encode: Encoder) -> list[Branch]:
    """The questions and captions of the train split that may go into shipped weights."""
    rows = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    captions = json.loads((folder / "pretrain_captions.json").read_text(encoding="utf-8"))
    licence = {row["image"]: row["meta"].get("licence") for row in rows if row.get("meta")}
    branches = []
    for row in [*rows, *captions]:
        source, picture = row["source"], row["image"]
        if source not in SOURCES or (source == "coco_mini" and licence.get(picture) not in LICENCES):
            continue
        question, answer = (turn["value"] for turn in row["conversations"])
        is_caption = "caption_by" in row or row["qtype"] == "caption"
        branches.append(
            encode(question, answer, picture=picture, source=source, kind="caption" if is_caption else "question",
                   qtype=row.get("qtype", "caption"))
        )  # fmt: skip
    return branches


def scene_pictures() -> Iterator[tuple[str, Image.Image, str, list[tuple[str, str]]]]:
    """Miniworld's scenes: key, picture, caption, questions with neutral answers."""
    for number in range(SCENES):
        scene, rng = draw_scene(DOMAINS[number % len(DOMAINS)], "train", number // len(DOMAINS), SEED)
        asked = [(question.text, question.answer) for question in scene.ask_several(rng, NEUTRAL, QUESTIONS)]
        yield f"miniworld/{number}", scene.paint(rng), scene.caption, asked


def scene_branches(encode: Encoder) -> list[Branch]:
    """A caption and the questions of every scene."""
    branches = []
    for key, _, caption, asked in scene_pictures():
        branches.append(encode("Describe all that is drawn.", caption, picture=key, source="miniworld", kind="caption"))
        branches += [
            encode(f"{text}\n{SHORT_ANSWER}", answer, picture=key, source="miniworld", kind="question", qtype="scene")
            for text, answer in asked
        ]
    return branches


def speech_branches(encode: Encoder, turns: Sequence[tuple[str, str, bool]]) -> list[Branch]:
    """Prompts with the language model's own answers; one that was cut off is not taught to end there."""
    branches = []
    for prompt, answer, ended in turns:
        whole = encode(prompt, answer, picture="", source="speech", kind="speech", qtype="speech")
        branches.append(whole if ended else replace(whole, ids=whole.ids[:-1], answer=whole.answer - 1))
    return branches


def take(branches: Sequence[Branch], stage: Stage, epoch: int) -> list[Branch]:
    """The branches of one epoch: of each source as much as the stage says, others in the next."""
    by_kind = defaultdict(list)
    for branch in branches:
        by_kind[branch.source, branch.kind].append(branch)
    taken = []
    for (source, kind), members in sorted(by_kind.items()):
        share = {"caption": stage.captions, "question": stage.questions, "speech": {"speech": stage.speech}}[kind]
        count = round(share.get(source, 0.0) * len(members))
        order = Random(f"{SEED}/{source}/{kind}").sample(range(len(members)), len(members))
        taken += [members[order[(epoch * count + i) % len(members)]] for i in range(count)]
    return taken


def pack(branches: Sequence[Branch], rng: Random) -> list[list[Branch]]:
    """Branches of one picture together, at most LONGEST; texts without a picture four together."""
    groups = defaultdict(list)
    for branch in rng.sample(list(branches), len(branches)):
        groups[branch.picture].append(branch)
    rows = []
    for picture, members in groups.items():
        size = LONGEST if picture else 4
        rows += [members[start : start + size] for start in range(0, len(members), size)]
    return rows


def length(row: list[Branch]) -> int:
    """Tokens of a packed row."""
    return len(row[0].head) + sum(len(branch.ids) for branch in row)


def batches(rows: list[list[Branch]], tokens: int, rng: Random) -> list[list[list[Branch]]]:
    """Rows of like length together, as many as fill `tokens` with padding, in random order."""
    found, batch = [], []
    for row in sorted(rng.sample(rows, len(rows)), key=length):
        if batch and length(row) * (len(batch) + 1) > tokens:
            found.append(batch)
            batch = []
        batch.append(row)
    if batch:
        found.append(batch)
    return rng.sample(found, len(found))


def collate(rows: list[list[Branch]], pad: int, image_id: int) -> dict[str, Tensor]:
    """
    Returns:
        input_ids, position_ids, labels: int64 `[B, S]`; a label stands at the place that predicts it.
        weights: float32 `[B, S]`: of an answer's tokens together, the root of their number.
        mask: bool `[B, 1, S, S]`: what each token sees.
        is_image: bool `[B, S]`.
    """
    longest = max(map(length, rows))
    ids = torch.full((len(rows), longest), pad)
    positions, group = torch.zeros_like(ids), torch.full_like(ids, -1)
    labels, weights = torch.full_like(ids, IGNORED), torch.zeros(ids.shape)
    for r, row in enumerate(rows):
        start = prefix = len(row[0].head)
        ids[r, :prefix] = torch.tensor(row[0].head, dtype=torch.long)
        positions[r, :prefix], group[r, :prefix] = torch.arange(prefix), 0
        for number, branch in enumerate(row, start=1):
            end = start + len(branch.ids)
            ids[r, start:end] = torch.tensor(branch.ids)
            positions[r, start:end], group[r, start:end] = torch.arange(prefix, prefix + end - start), number
            labels[r, end - branch.answer - 1 : end - 1] = ids[r, end - branch.answer : end]
            weights[r, end - branch.answer - 1 : end - 1] = branch.answer**-0.5
            start = end
    same = group[:, :, None] == group[:, None, :]
    sees = (same | (group[:, None, :] == 0)) & torch.ones(longest, longest, dtype=torch.bool).tril()
    return {
        "input_ids": ids, "position_ids": positions, "labels": labels, "weights": weights, "mask": sees[:, None],
        "is_image": ids == image_id,
    }  # fmt: skip
