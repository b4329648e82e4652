"""Checks the values of free dictionaries, `model.adapter` and `model.fields`, by the annotations of what takes them."""

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from mllm.common.errors import UserError
from mllm.common.plain_yaml import EXPONENT

# What the classes themselves find late or never; they check the others.
ABOVE_ZERO = (
    "r", "lora_alpha", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "head_dim",
)  # fmt: skip
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}  # their numbers mean what these fields mean
SHARES = ("lora_dropout", "attention_dropout")  # in [0, 1)
# What PEFT's annotations do not spell out: pissa_niter_16; and that patterns give numbers. A rank that comes as 10.0 or
# "8" would fail deep inside torch, an alpha that comes as text in the first forward.
LOOSE = {"init_lora_weights": bool | str, "rank_pattern": dict[str, int], "alpha_pattern": dict[str, float]}


def checked_fields(values: Mapping[str, Any], kind: type, known: list[str], key: str) -> dict[str, Any]:
    """The values as the class takes them: `10.0` as 10, and a text that is a number as one, where a number is due.

    Args:
        values: field -> value, as read from YAML.
        kind: the class whose annotations tell the types.
        known: names that may be given.
        key: the section's dotted name, for messages.

    Raises:
        UserError: an unknown name (the nearest is named), a value of another type, or one out of range.
    """
    hints = annotations_of(kind) | LOOSE
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown key {key}.{name}" + suggest(str(name), known))
        annotation = hints.get(name, Any)
        try:
            refuse_mistaken(value, annotation)
            checked[name] = as_type(value, annotation)
        except ValidationError as error:
            said = " or ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))
            raise UserError(f"{key}.{name}: {said[0].lower()}{said[1:]} (got {value!r})") from None
        except ValueError as error:
            raise UserError(f"{key}.{name}: {error} (got {value!r})") from None
        inner = checked[name] if name in PATTERNS else {}
        for part, number in inner.items():
            check_range(PATTERNS[name], number, f"{key}.{name}.{part}")
        check_range(name, checked[name], f"{key}.{name}")
    return checked


def as_type(value: Any, annotation: Any) -> Any:
    """The value in the annotation's type. Raises pydantic.ValidationError where it has none."""
    if isinstance(value, str) and str not in kinds_of(annotation) and EXPONENT.fullmatch(value):
        value = float(value)  # pydantic reads "8" as a whole number, and "1e1" as none
    try:
        adapter = TypeAdapter(annotation)
    except (PydanticUserError, PydanticSchemaGenerationError):  # a type that pydantic cannot check
        return value
    return adapter.validate_python(value)


def annotations_of(kind: type) -> dict[str, Any]:
    """Field -> type, of a class and those above it; Any where a type's module is imported for type checkers only."""
    found = {}
    for base in reversed(kind.__mro__):
        for name, annotation in vars(base).get("__annotations__", {}).items():
            alone = type("Alone", (), {"__annotations__": {name: annotation}, "__module__": base.__module__})
            try:
                found |= get_type_hints(alone)
            except NameError:
                found[name] = Any
    return found


def check_range(name: str, value: Any, key: str) -> None:
    """Raises UserError for a number that its field cannot mean."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if name in ABOVE_ZERO and value <= 0:
        raise UserError(f"{key} must be above 0 (got {value!r})")
    if name in SHARES and not 0 <= value < 1:
        raise UserError(f"{key} must be in [0, 1) (got {value!r})")


def refuse_mistaken(value: Any, annotation: Any) -> None:
    """Raises ValueError for what pydantic would take, and nobody means: true for 1, an empty text, NaN, infinity."""
    takes_bools = not {bool, Any}.isdisjoint(kinds_of(annotation))
    for each in leaves(value):
        if isinstance(each, bool) and not takes_bools:
            raise ValueError(f"{str(each).lower()} is neither a number nor a text")
        if isinstance(each, str) and not each.strip():
            raise ValueError("is empty")
        if isinstance(each, float) and not math.isfinite(each):
            raise ValueError("must be a finite number")


def leaves(value: Any) -> list[Any]:
    """What is in a value of lists and mappings, and is neither."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in leaves(each)]
    return [value]


def kinds_of(annotation: Any) -> set[Any]:
    """The types an annotation is put together from; of a Literal those of its values."""
    if get_origin(annotation) is Literal:
        return {type(choice) for choice in get_args(annotation)}
    return {annotation}.union(*(kinds_of(part) for part in get_args(annotation) if part is not Ellipsis))


def suggest(name: str, known: list[str]) -> str:
    """` (did you mean …? known: …)` for a message about an unknown name."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    question = f"did you mean {near[0]}? " if near else ""
    return f" ({question}known: {', '.join(known)})"
