"""One training or test sample: turns of text with the places of its pictures, checked as it is read."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mllm.common.errors import RowError, UserError
from mllm.data.formats import IMAGE_PLACE, EmbeddedImage, as_llava
from mllm.data.images import missing_image

_HALF_PAIR = re.compile("[\ud800-\udfff]")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """What one side says, or what is said to the model before they begin. `text` of a user holds `<image>` where a
    picture stands.
    """

    role: Literal["user", "assistant", "system"]
    text: str
    pieces: tuple[str, ...] | None = None  # the text between its pictures, where `<image>` may also be a word of it
    supervised: bool = True  # whether an answer is learnt; it is read as context in any case

    @property
    def between_pictures(self) -> tuple[str, ...]:
        """Its text in one piece more than it has pictures."""
        if self.pieces is not None:
            return self.pieces
        return tuple(self.text.split(IMAGE_PLACE)) if self.role == "user" else (self.text,)


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate user, assistant, user, … and the pictures they speak of. A system turn may go before.

    Read from a record it ends with an answer; one made by hand may end with a question, to be answered.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path | EmbeddedImage, ...] = ()
    source: str = "unnamed"
    domain: str = "unnamed"
    metric: str | None = None
    answers: tuple[str, ...] = ()  # every accepted answer to the last question
    options: tuple[str, ...] = ()  # what is to be chosen from, as asked; the first is A
    qtype: str | None = None
    where: str = "conversation"  # "file.json: row 12 (id …)", for messages
    opening_dropped: bool = False  # whether the record began with an answer to nothing, which LLaVA drops

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
        A first turn may be the system's, or stand under the key `system`. A first turn of the assistant is dropped.
        `loss: false` or `weight: 0` in an answer's turn leaves it out of what is learnt.
        `source`, `domain`, `metric`, `qtype`, `answers` and `options` (a list of texts) are taken over where present,
        other keys are left alone.

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
        turns, opening_dropped = _read_turns(record, where)
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
            options=_read_options(record),
            qtype=_optional_text(record, "qtype", where),
            where=where,
            opening_dropped=opening_dropped,
        )
        check_turns(turns, where)
        named = (identity, source, conversation.domain, conversation.metric, conversation.qtype, *conversation.answers)
        for text in filter(None, named):
            check_whole(text, where)
        return conversation

    @property
    def question(self) -> str:
        """The last question, without its `<image>` marks."""
        return self._questions()[-1]

    @property
    def first_question(self) -> str:
        """Likewise."""
        return self._questions()[0]

    def _questions(self) -> list[str]:
        return ["".join(turn.between_pictures).strip() for turn in self.turns if turn.role == "user"]


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


def _read_turns(record: Mapping[str, Any], where: str) -> tuple[tuple[Turn, ...], bool]:
    """The turns, and whether one of the assistant before them was dropped."""
    rows = record.get("conversations", record.get("messages"))
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{where}: expected `conversations`, a list of turns that is not empty, got {rows!r:.60}.")
    has_image_parts = _has_image_parts(rows)
    turns = [_read_turn(row, f"{where}, turn {number}", has_image_parts) for number, row in enumerate(rows, 1)]
    system = _read_system(record, turns, where)
    begin = 1 if turns[0].role == "system" else 0
    opening_dropped = len(turns) > begin + 1 and turns[begin].role == "assistant"
    begin += opening_dropped
    for number, turn in enumerate(turns[begin:], begin + 1):
        expected = "assistant" if (number - begin) % 2 == 0 else "user"
        if turn.role == "system":
            raise UserError(f"{where}, turn {number}: a system turn goes before all others. Move it to the front.")
        if turn.role != expected:
            raise UserError(
                f"{where}, turn {number}: expected a turn of {_names(expected)}, got one of {_names(turn.role)}. "
                "Turns alternate and begin with the human's"
                + (": the human turn before has no answer." if expected == "assistant" else ".")
            )
    if turns[-1].role != "assistant":
        what = "human turn" if turns[-1].role == "user" else "system turn"
        raise UserError(f"{where}, turn {len(turns)}: {what} without an answer. Add the answer or drop the turn.")
    if not any(turn.supervised for turn in turns[begin:] if turn.role == "assistant"):
        raise UserError(f"{where}: every answer is left out of the loss, so that nothing is learnt. Drop the row.")
    return (*system, *turns[begin:]), opening_dropped


def _read_system(record: Mapping[str, Any], turns: list[Turn], where: str) -> tuple[Turn, ...]:
    """What is said to the model before the turns, from a turn or a key of the record; empty text says nothing."""
    text = (_optional_text(record, "system", where) or "").strip()
    if turns[0].role != "system":
        return (Turn("system", text),) if text else ()
    if text and text != turns[0].text:
        raise UserError(f"{where}: a `system` key and a system turn that differ. Keep one of them.")
    return (turns[0],) if turns[0].text else ()


def _names(role: str) -> str:
    return " or ".join(repr(name) for name, meaning in ROLES.items() if meaning == role)


def _read_turn(row: object, where: str, has_image_parts: bool) -> Turn:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected {{from, value}}, got {row!r:.60}.")
    name = row.get("from", row.get("role"))
    if not isinstance(name, str) or name not in ROLES:
        raise UserError(f"{where}: expected `from` to be one of {', '.join(ROLES)}, got {name!r:.60}.")
    role, content = ROLES[name], row.get("value", row.get("content"))
    pieces = _read_pieces(content, where)
    text = IMAGE_PLACE.join(pieces)
    has_pictures = len(pieces) > 1 or (IMAGE_PLACE in text and not has_image_parts)
    if role != "user" and has_pictures:
        what = "an answer" if role == "assistant" else "a system turn"
        raise UserError(f"{where}: {IMAGE_PLACE} stands in {what}; pictures belong to questions.")
    if not text and role != "system":
        what = "empty answer" if role == "assistant" else "empty question"
        raise UserError(f"{where}: {what}. Give it text or drop the record.")
    is_plain = not has_image_parts or not any(IMAGE_PLACE in piece for piece in pieces)
    return Turn(role, text, None if is_plain else pieces, _read_loss(row, role, where))


def _read_pieces(value: object, where: str) -> tuple[str, ...]:
    """A turn's text between its `{type: image}` parts, from a string or from a list of `{type: text | image}` parts."""
    if isinstance(value, str):
        return (value.strip(),)
    if not isinstance(value, list):
        raise UserError(f"{where}: expected `value` to be text, got {type(value).__name__}.")
    pieces = [""]
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            pieces.append("")
        elif kind == "text" and isinstance(part.get("text"), str):
            pieces[-1] += part["text"]
        else:
            raise UserError(f"{where}: expected parts {{type: image}} and {{type: text, text: …}}, got {part!r:.60}.")
    pieces[0], pieces[-1] = pieces[0].lstrip(), pieces[-1].rstrip()
    return tuple(pieces)


def _has_image_parts(rows: list[Any]) -> bool:
    """Whether a record says with parts where its pictures stand, so that `<image>` is a word like any other in it."""
    contents = (row.get("value", row.get("content")) for row in rows if isinstance(row, Mapping))
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def _read_loss(row: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a turn is learnt: `loss` as true or false, or `weight` as 1 or 0. Only answers are."""
    given = {key: row[key] for key in ("loss", "weight") if row.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(
                f"{where}: `{key}` is {value!r:.60}; an answer is learnt or it is not (true or false, 1 or 0). "
                "Give the record's source a weight in the mixture instead."
            )
    values = {bool(value) for value in given.values()}
    if len(values) > 1:
        raise UserError(f"{where}: `loss` and `weight` differ. Keep one of them.")
    if role != "assistant" and True in values:
        raise UserError(f"{where}: `{next(iter(given))}` asks to learn a turn of the {role}; only answers are learnt.")
    return role != "assistant" or False not in values


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
    num_places = sum(len(turn.between_pictures) - 1 for turn in turns)
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


def _read_options(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A list of texts; `options` of another form is some other tool's, and a metric that needs them will say so."""
    options = record.get("options")
    is_ours = isinstance(options, list) and all(isinstance(option, str) for option in options)
    return tuple(options) if is_ours else ()


def _optional_text(record: Mapping[str, Any], key: str, where: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: expected `{key}` to be text, got {value!r:.60}.")
    return value or None
