"""One training or test sample: turns of text with the places of its pictures, checked as it is read."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mllm.data.formats import IMAGE_PLACE, EmbeddedImage, as_llava
from mllm.data.images import missing_image
from mllm.errors import RowError, UserError

_HALF_PAIR = re.compile("[\ud800-\udfff]")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """What one side says. `text` holds `<image>` where a picture stands."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate user, assistant, user, … and the pictures they speak of.

    Read from a record it ends with an answer; one made by hand may end with a question, to be answered.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path | EmbeddedImage, ...] = ()
    source: str = "unnamed"
    domain: str = "unnamed"
    metric: str | None = None
    answers: tuple[str, ...] = ()  # every accepted answer to the last question
    qtype: str | None = None
    where: str = "conversation"  # "file.json: row 12 (id …)", for messages

    @classmethod
    def from_record(
        cls,
        record: Mapping[str, Any],
        *,
        image_root: str | Path,
        where: str,
        source: str | None = None,
        domain: str | None = None,
        check_files: bool = True,
        allow_outside_root: bool = False,
        columns: Mapping[str, str] | None = None,
    ) -> "Conversation":
        """Reads a LLaVA record: `{id, image?, conversations: [{from: human|gpt, value}], …}`.

        Other layouts are read too, see `mllm.data.formats`; `image` is a path under `image_root`, a list of them, or
        absent. Pictures without any mark stand before the first question.
        `source`, `domain`, `metric`, `qtype` and `answers` are taken over where present, other keys are left alone.

        Args:
            where: file and row, put before every message; the record's id is added to it.
            source: name that replaces the record's own. Without either it is "unnamed".
            domain: likewise; without either it is the source's name.
            check_files: whether to look that every picture exists.
            allow_outside_root: whether absolute paths and `..` are let through.
            columns: our names of columns (question, answer, image …) -> the record's, where they differ.

        Raises:
            UserError: turns do not alternate or end without an answer, an empty text, half a character, `<image>` marks
                and pictures differ in number, a path outside the root. `ImageError`, if a picture's file is missing.
        """
        if not isinstance(record, Mapping):
            raise UserError(f"{where}: expected a record like {{…}}, got {type(record).__name__}.")
        identity = str(record.get((columns or {}).get("id", "id"), ""))
        if identity:
            where = f"{where} (id {identity:.80})"
        record = as_llava(record, where, columns)
        turns = _read_turns(record, where)
        images = _read_images(record, Path(image_root), where, allow_outside_root)
        _check_image_places(turns, len(images), where)
        if check_files:
            for path in images:
                if not isinstance(path, EmbeddedImage) and not os.path.isfile(path):
                    raise missing_image(path, where)
        source = source or _optional_text(record, "source", where) or "unnamed"
        conversation = cls(
            id=identity,
            turns=turns,
            images=images,
            source=source,
            domain=domain or _optional_text(record, "domain", where) or source,
            metric=_optional_text(record, "metric", where),
            answers=_read_answers(record, turns, where),
            qtype=_optional_text(record, "qtype", where),
            where=where,
        )
        check_turns(turns, where)
        named = (identity, source, conversation.domain, conversation.metric, conversation.qtype, *conversation.answers)
        for text in filter(None, named):
            check_whole(text, where)
        return conversation

    @property
    def question(self) -> str:
        """The last question, without its `<image>` marks."""
        text = next(turn.text for turn in reversed(self.turns) if turn.role == "user")
        return text.replace(IMAGE_PLACE, "").strip()


def check_turns(turns: Sequence[Turn], where: str) -> None:
    """Raises RowError for a turn that holds half a character pair."""
    for number, turn in enumerate(turns, 1):
        check_whole(turn.text, f"{where}, turn {number}")


def check_whole(text: str, where: str) -> None:
    """Raises RowError for half a character pair, which JSON can write and neither a tokenizer nor a file can take."""
    half = _HALF_PAIR.search(text)
    if half:
        raise RowError(
            f"{where}: {half.group()} is half of a character, as cut text leaves behind, in"
            f" {text[max(0, half.start() - 30) : half.end()]!r}. Mend or drop it."
        )


def _read_turns(record: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    rows = record.get("conversations", record.get("messages"))
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{where}: expected `conversations`, a list of turns that is not empty, got {rows!r:.60}.")
    turns = []
    for number, row in enumerate(rows, 1):
        turn = _read_turn(row, f"{where}, turn {number}")
        expected = "assistant" if number % 2 == 0 else "user"
        if turn.role != expected:
            raise UserError(
                f"{where}, turn {number}: expected a turn of {_names(expected)}, got one of {_names(turn.role)}. "
                "Turns alternate and begin with the human's"
                + (": the human turn before has no answer." if expected == "assistant" else ".")
            )
        turns.append(turn)
    if turns[-1].role == "user":
        raise UserError(f"{where}, turn {len(turns)}: human turn without an answer. Add the answer or drop the turn.")
    return tuple(turns)


def _names(role: str) -> str:
    return " or ".join(repr(name) for name, meaning in ROLES.items() if meaning == role)


def _read_turn(row: object, where: str) -> Turn:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected {{from, value}}, got {row!r:.60}.")
    role = row.get("from", row.get("role"))
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}: expected `from` to be one of {', '.join(ROLES)}, got {role!r:.60}.")
    text = _read_text(row.get("value", row.get("content")), where)
    if ROLES[role] == "assistant" and IMAGE_PLACE in text:
        raise UserError(f"{where}: {IMAGE_PLACE} stands in an answer; pictures belong to questions.")
    if not text:
        what = "empty answer" if ROLES[role] == "assistant" else "empty question"
        raise UserError(f"{where}: {what}. Give it text or drop the record.")
    return Turn(ROLES[role], text)


def _read_text(value: object, where: str) -> str:
    """A turn's text, from a string or from a list of `{type: text | image}` parts."""
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, list):
        raise UserError(f"{where}: expected `value` to be text, got {type(value).__name__}.")
    pieces = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            pieces.append(IMAGE_PLACE)
        elif kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            raise UserError(f"{where}: expected parts {{type: image}} and {{type: text, text: …}}, got {part!r:.60}.")
    return "".join(pieces).strip()


def _read_images(
    record: Mapping[str, Any], image_root: Path, where: str, allow_outside_root: bool
) -> tuple[Path | EmbeddedImage, ...]:
    names = record["image"]
    if not all(isinstance(name, str | EmbeddedImage) and name for name in names):
        raise UserError(f"{where}: expected `image` to be a path or a list of paths, got {names!r:.60}.")
    for name in names:
        if isinstance(name, EmbeddedImage):
            continue
        check_whole(name, where)
        if "://" in name:
            raise UserError(f"{where}: image {name:.80} is a URL; only files under the image root are read.")
        path = PurePosixPath(name)
        if not allow_outside_root and (path.is_absolute() or ".." in path.parts):
            raise UserError(
                f"{where}: image {name:.200} lies outside the image root {image_root}. Make it relative to the root, "
                "or set `allow_outside_root: true` for this source."
            )
    return tuple(name if isinstance(name, EmbeddedImage) else image_root / name for name in names)


def _check_image_places(turns: tuple[Turn, ...], num_images: int, where: str) -> None:
    num_places = sum(turn.text.count(IMAGE_PLACE) for turn in turns)
    if num_places > num_images:
        raise UserError(
            f"{where}: more {IMAGE_PLACE} marks ({num_places}) than pictures ({num_images}). "
            "Name every picture in `image`, or remove the marks."
        )
    if num_places < num_images:
        raise UserError(
            f"{where}: fewer {IMAGE_PLACE} marks ({num_places}) than pictures ({num_images}). "
            f"Put one {IMAGE_PLACE} into the human's text where each picture belongs."
        )


def _read_answers(record: Mapping[str, Any], turns: tuple[Turn, ...], where: str) -> tuple[str, ...]:
    answers = record.get("answers")
    if answers is None:
        return (turns[-1].text,)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str | int | float) for a in answers):
        raise UserError(f"{where}: expected `answers` to be a list of texts that is not empty, got {answers!r:.60}.")
    return tuple(str(answer) for answer in answers)


def _optional_text(record: Mapping[str, Any], key: str, where: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: expected `{key}` to be text, got {value!r:.60}.")
    return value or None
