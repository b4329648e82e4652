"""Other layouts of a record as LLaVA's: `{conversations: [{from, value}], image: [file or embedded picture]}`.

Read besides LLaVA's own (and LLaVA-Med's `conversatons`):
    {messages: [{role, content}], images}    content a text, or parts {type: text}, {type: image},
                                             {type: image, image: file}, {type: image_url, image_url: {url}}
    {query, response, history, images}       ms-swift
    {instruction, input, output, history}    alpaca
    {question, answer}                       columns of that name, or those that the mixture names
A picture is a file under the image root, a data URL, or `{bytes, path}` with base64. What no layout has a place for
(video, tools, preference pairs) is refused by name.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from mllm.common.errors import UserError

IMAGE_PLACE = "<image>"  # LLaVA's mark in a turn's text: the k-th mark is the place of the k-th picture
TURNS = ("conversations", "messages", "conversatons")
PAIRS = {"query": "response", "instruction": "output", "question": "answer"}  # key of a question: of its answer
IMAGES = ("image", "images")
COLUMNS = ("question", "answer", "answers", "image", "id", "source", "domain", "metric", "qtype", "system")
UNUSABLE = {
    **dict.fromkeys(("video", "videos"), "video"),
    **dict.fromkeys(("audio", "audios"), "audio"),
    **dict.fromkeys(("tools", "functions", "tool_calls"), "calls of tools"),
    **dict.fromkeys(("chosen", "rejected", "rejected_response"), "preference pairs"),
}


class EmbeddedImage(bytes):
    """The file of a picture that stands in the record itself. Shown, and told apart, by a hash of it."""

    def __str__(self) -> str:
        return f"embedded-{hashlib.blake2b(self, digest_size=6).hexdigest()}"

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    @property
    def name(self) -> str:
        return str(self)


def as_llava(record: Mapping[str, Any], where: str, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The record with `conversations` and `image` as a list; its other keys stay.

    Args:
        columns: our name of a column (one of `COLUMNS`) -> the record's.

    Raises:
        UserError: no layout fits (the nearest key is named), what none has a place for, or pictures of no known form.
    """
    for key, what in UNUSABLE.items():
        if record.get(key):
            raise UserError(f"{where}: `{key}` holds {what}, which is not trained on here. Drop the key or the row.")
    record = dict(record)
    for ours, theirs in (columns or {}).items():
        if theirs in record:
            record[ours] = record.pop(theirs)
    if isinstance(record.get("answer"), list):
        record.setdefault("answers", record["answer"])
    turns = _turns(record, where)
    images = _images(record, where)
    turns, own_images = _without_own_images(turns, where)
    if images and own_images:
        raise UserError(f"{where}: pictures both in `image` and in the turns' parts. Keep one of them.")
    images = images or own_images
    if images and not any(map(_has_mark, turns)):
        turns = _with_marks_in_front(turns, len(images))
    if not images and any(map(_has_mark, turns)):
        _refuse_misspelt(record, IMAGES, where)
    if isinstance(record.get("domain"), Mapping):  # LLaVA-Med: {chest_xray: true, mri: false, …}
        true = [name for name, flag in record["domain"].items() if flag is True]
        record["domain"] = true[0] if len(true) == 1 else None
    for key in (*TURNS, *IMAGES):
        record.pop(key, None)
    return record | {"conversations": turns, "image": images}


# -- turns -------------------------------------------------------------------------------------------------------------


def _turns(record: Mapping[str, Any], where: str) -> list[Any]:
    for key in TURNS:
        if record.get(key) is not None:
            if not isinstance(record[key], list) or not record[key]:
                raise UserError(
                    f"{where}: expected `{key}`, a list of turns that is not empty, got {record[key]!r:.60}."
                )
            return record[key]
    for question, answer in PAIRS.items():
        if question in record or answer in record:
            return _pairs(record, question, answer, where)
    _refuse_misspelt(record, (*TURNS[:2], *PAIRS, *PAIRS.values()), where)
    keys = ", ".join(f"`{key}`" for key in list(record)[:8]) or "none"
    raise UserError(
        f"{where}: expected `conversations`, a list of turns that is not empty, but its keys are {keys:.200}. Where a"
        " question and its answer have columns of their own, name them in the mixture:"
        " columns: {question: …, answer: …}."
    )


def _pairs(record: Mapping[str, Any], question: str, answer: str, where: str) -> list[dict[str, Any]]:
    """Questions and answers of the history, then those of the record."""
    history = record.get("history") or []
    is_pair = [isinstance(pair, list) and len(pair) == 2 for pair in history] if isinstance(history, list) else [False]
    if not all(is_pair):
        raise UserError(f"{where}: expected `history`, a list of [question, answer], got {history!r:.60}.")
    asked = _text(record.get(question), question, where)
    if question == "instruction" and record.get("input"):
        asked = f"{asked}\n{_text(record['input'], 'input', where)}"
    answers = record.get(answer)
    first = answers[0] if isinstance(answers, list) and answers else answers  # all accepted: one is learnt
    pairs = [*history, [asked, _text(first, answer, where)]]
    return [{"from": ("human", "gpt")[k], "value": text} for pair in pairs for k, text in enumerate(pair)]


def _text(value: object, key: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: expected `{key}` to be text, got {value!r:.60}.")
    return str(value)


def _refuse_misspelt(record: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raises UserError if a key of the record is nearly one of those."""
    for key in record:
        near = get_close_matches(str(key).lower(), known, n=1, cutoff=0.75)
        if near:
            raise UserError(f"{where}: no `{near[0]}`, but a key `{key:.60}`: did you mean `{near[0]}`?")


# -- pictures ----------------------------------------------------------------------------------------------------------


def _images(record: Mapping[str, Any], where: str) -> list[Any]:
    value = next((record[key] for key in IMAGES if record.get(key) not in (None, "", [])), [])
    return [_image(each, where) for each in (value if isinstance(value, list) else [value])]


def _image(value: Any, where: str) -> Any:
    """A file's name as it is, an embedded picture decoded; anything else is left to be refused."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value or "url" in value):
        value = value.get("bytes") or value.get("path") or value.get("url")
        return _decoded(value, where) if value is not None and not _is_name(value) else _image(value, where)
    if isinstance(value, str) and value.startswith("data:"):
        head, comma, data = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise UserError(f"{where}: a data URL must be data:image/…;base64,…, got {value!r:.60}.")
        return _decoded(data, where)
    return value.removeprefix("file://") if isinstance(value, str) else value


def _is_name(value: Any) -> bool:
    """Whether text is a file's name or an address rather than base64 of a picture."""
    return isinstance(value, str) and (len(value) < 64 or "." in value or ":" in value)


def _decoded(data: Any, where: str) -> EmbeddedImage:
    try:
        return EmbeddedImage(base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError, TypeError) as error:
        raise UserError(f"{where}: an embedded picture is not base64 ({error}).") from error


def _without_own_images(turns: list[Any], where: str) -> tuple[list[Any], list[Any]]:
    """The turns with `{type: image}` for every part that brings its picture, and those pictures."""
    images: list[Any] = []
    plain = []
    for turn in turns:
        key = "content" if isinstance(turn, Mapping) and isinstance(turn.get("content"), list) else "value"
        if isinstance(turn, Mapping) and isinstance(turn.get(key), list):
            parts = []
            for part in turn[key]:
                own = _own_image(part)
                if own is not None:
                    images.append(_image(own, where))
                parts.append(part if own is None else {"type": "image"})
            turn = {**turn, key: parts}
        plain.append(turn)
    return plain, images


def _own_image(part: Any) -> Any:
    """What a part names as its picture; None for text, and for a mark of a picture that stands elsewhere."""
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
        return None
    for key in ("image_url", "image", "url", "path"):
        if part.get(key):
            return part[key]
    return None


def _has_mark(turn: Any) -> bool:
    content = _content(turn)
    if isinstance(content, list):
        return any(isinstance(part, Mapping) and part.get("type") == "image" for part in content)
    return isinstance(content, str) and IMAGE_PLACE in content


def _content(turn: Any) -> Any:
    return turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None


def _with_marks_in_front(turns: list[Any], number: int) -> list[Any]:
    """Pictures that no turn marks stand before the first question, as LLaVA-NeXT's rows mean it."""
    for place, turn in enumerate(turns):
        content = _content(turn)
        if isinstance(turn, Mapping) and turn.get("from", turn.get("role")) in ("human", "user"):
            key = "value" if "value" in turn else "content"
            if isinstance(content, str):
                marked = {**turn, key: f"{IMAGE_PLACE}\n" * number + content}
            elif isinstance(content, list):
                marked = {**turn, key: [{"type": "image"}] * number + content}
            else:
                break
            return [*turns[:place], marked, *turns[place + 1 :]]
    return turns
