"""Names of modules in settings and of weights in files: what matches nothing is refused."""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from mllm.common.errors import UserError

# A group of alternatives that holds no group itself; not a look-around.
CHOICE = re.compile(r"(?<!\\)\((?:\?:|(?!\?))([^()]*\|[^()]*)\)")


def matches(patterns: Iterable[str] | str, name: str) -> bool:
    """Whether a full module name is meant: by a regular expression (a string) or by its ending (any of several)."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in patterns)


def check_names(
    field: str,
    patterns: Iterable[str] | str | None,
    names: Iterable[str],
    *,
    where: str,
    known: Iterable[str] | None = None,
) -> None:
    """Refuses names that match nothing, although others beside them do.

    Args:
        field: the setting, for the message.
        patterns: as `matches` takes them; of a regular expression each alternative must match.
        names: full names that there are.
        where: what they are, for the message, such as "module of the language model".
        known: names to take the nearest from, where they are more than `names`.

    Raises:
        UserError: one matches none; the nearest name is given.
    """
    names = list(names)
    try:
        readings = list(_readings(patterns)) if isinstance(patterns, str) else [([p], p) for p in patterns or ()]
    except re.error as error:
        raise UserError(f"{field}={patterns!r} is no regular expression: {error}.") from error
    for pattern, told in readings:
        if not any(matches(pattern, name) for name in names):
            raise UserError(f"{field}: {told!r} matches no {where}{nearest(told, known or names)}.")


def nearest(name: str, names: Iterable[str]) -> str:
    """` (nearest: …)`: the endings of these names that are most like it; "" where none is."""
    depth = name.count(".") + 1
    endings = {".".join(each.split(".")[-depth:]) for each in names if each}
    # An index of a layer is no name that anybody meant.
    found = get_close_matches(name, sorted(each for each in endings if not each.isdigit()), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(found)})" if found else ""


def check_keys(what: str, holder: str, info: dict[str, Any]) -> None:
    """Raises UserError, naming the first few, where a checkpoint lacks weights or has some without a place."""
    if info["missing_keys"]:
        raise UserError(f"{what} lacks {few(info['missing_keys'])}.")
    other_shapes = info.get("mismatched_keys")
    if other_shapes:
        name, came, due = min(other_shapes)
        raise UserError(
            f"{what} has {few([each[0] for each in other_shapes])} of another shape: {name} is {list(came)}, "
            f"but {list(due)} by its config.json."
        )
    # Tables that older releases saved and that are computed now.
    extra = [key for key in info["unexpected_keys"] if not key.endswith((".inv_freq", ".position_ids"))]
    if extra:
        raise UserError(
            f"{what} holds {few(extra)} for which {holder} has no place. Without them it would be another model, so "
            "it is not loaded."
        )


def few(names: Iterable[str]) -> str:
    """`3 weights (a, b, c)`, the first three by name."""
    names = sorted(names)
    more = ", …" if len(names) > 3 else ""
    return f"{len(names)} weight{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"


def _readings(pattern: str) -> Iterator[tuple[str, str]]:
    """The expression, then the same with each of its alternatives alone; beside each the text that it stands for."""
    re.compile(pattern)
    yield pattern, pattern
    choices = [(found.start(), found.end(), found[1]) for found in CHOICE.finditer(pattern)]
    if "|" in pattern and not set("([") & set(pattern):
        choices.append((0, len(pattern), pattern))
    for start, end, inside in choices:
        for alternative in filter(None, inside.split("|")):
            reading = f"{pattern[:start]}(?:{alternative}){pattern[end:]}"
            try:
                re.compile(reading)
            except re.error:
                continue  # the bar stood in a character class
            yield reading, alternative
