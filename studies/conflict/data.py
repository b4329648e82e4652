"""The samples of a study: read or drawn, checked for their domains, cut to size, pictures embedded.

N samples of a split.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from data_recipes import clashes
from data_recipes.miniworld.__main__ import recipe_version
from mllm.common.errors import UserError
from mllm.data.conversation import Conversation
from mllm.data.mixture import load_mixture
from studies.conflict.config import DataSection, MiniworldSection
from studies.finetune import CachedSet, cache
from studies.runner import digest, locked

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class StudyRows:
    """Conversations of each split. `train` holds those of `mix` first, then those that only the arm `twice` sees."""

    train: list[Conversation]
    val: list[Conversation]
    test: list[Conversation]
    mixed: int  # how many of `train` the mix has
    twice: str  # where the second half of `twice` comes from: "new samples" or "a second pass"

    @property
    def domains(self) -> list[str]:
        """Names, sorted; every split has them all."""
        return sorted({row.domain for row in self.val})

    def facts(self) -> dict[str, Any]:
        """What a report says of the data, and what tells it from other data."""
        mix = self.train[: self.mixed]
        counts = {"train": mix, "val": self.val, "test": self.test}
        seen = {picture for row in (*self.train, *self.val) for picture in row.images}
        return {
            "domains": self.domains,
            "rows": {name: dict(sorted(Counter(row.domain for row in rows).items())) for name, rows in counts.items()},
            "twice": self.twice,
            "test_pictures_seen_in_training": len({picture for row in self.test for picture in row.images} & seen),
            "data": {name: digest([_plain(row) for row in rows]) for name, rows in counts.items()},
            "data_twice": digest([_plain(row) for row in self.train]),
        }


def _plain(row: Conversation) -> list[Any]:
    """A row by its words, its domain and its pictures' names and sizes."""
    pictures = [(file.name, len(file) if isinstance(file, bytes) else file.stat().st_size) for file in row.images]
    turns = [(turn.role, turn.text, *(() if turn.supervised else ("not learnt",))) for turn in row.turns]
    return [turns, row.domain, row.source, pictures]


def read_rows(section: DataSection, *, with_twice: bool) -> StudyRows:
    """The rows a study needs.

    Raises:
        UserError: what reading refuses; fewer than two domains; a split without one of them; weights in a mixture.
    """
    if section.miniworld is not None:
        copies = 2 if with_twice else 1
        folder = draw(section.miniworld, copies=copies)
        splits = {name: _read(folder / f"{name}.json", f"data.miniworld {name}") for name in SPLITS}
        kept = {domain: _first_pictures(rows, copies) for domain, rows in _by_domain(splits["train"]).items()}
        first, more = ([row for halves in kept.values() for row in halves[half]] for half in (0, 1))
    else:
        paths = {name: getattr(section, name) for name in SPLITS}
        splits = {name: _read(path, f"data.{name}") for name, path in paths.items() if path is not None}
        if "val" not in splits:
            splits["train"], splits["val"] = hold_out(splits["train"], section.val_share, section.samples_per_domain)
        first, more = _cut(_by_domain(splits["train"]), section.samples_per_domain, with_twice=with_twice)
    _check_domains(splits)
    twice = "new samples" if more else "a second pass"
    return StudyRows([*first, *more], splits["val"], splits["test"], len(first), twice)


def _read(path: Path, key: str) -> list[Conversation]:
    mixture = load_mixture(path)
    weighted = next((source for source in mixture.config.sources if source.weight != 1), None)
    if weighted is not None:
        raise UserError(
            f"{key}: {path} gives {weighted.path} the weight {weighted.weight}, but a conflict study takes every row "
            "once. Leave weights out; data.samples_per_domain cuts large domains."
        )
    return [mixture[row] for row in range(len(mixture))]


def _by_domain(rows: Sequence[Conversation]) -> dict[str, list[Conversation]]:
    named: dict[str, list[Conversation]] = {}
    for row in rows:
        named.setdefault(row.domain, []).append(row)
    return dict(sorted(named.items()))


def _first_pictures(rows: list[Conversation], copies: int) -> tuple[list[Conversation], list[Conversation]]:
    """The rows of the first 1 / copies of the pictures, and the others: a longer drawing begins as a shorter one."""
    pictures = list(dict.fromkeys(row.images for row in rows))
    first = set(pictures[: len(pictures) // copies])
    return [row for row in rows if row.images in first], [row for row in rows if row.images not in first]


def hold_out(rows: list[Conversation], share: float, cap: int | None) -> tuple[list[Conversation], list[Conversation]]:
    """The rows to train on and those held out: of each domain pictures at random, with all their rows.

    As many as bring about `share` of the domain's rows, or of the `cap` rows that are trained on. Both keep their
    order. A row without a picture is one of its own.
    """
    rows_of: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        for key in row.images or (place,):
            rows_of.setdefault(key, []).append(place)
    held: set[int] = set()
    for domain in sorted({row.domain for row in rows}):
        places = [place for place, row in enumerate(rows) if row.domain == domain]
        wanted = len(held) + share * min(len(places), cap or len(places))
        for place in np.random.default_rng(1).permutation(places).tolist():
            if len(held) >= wanted:
                break
            held.update(other for key in rows[place].images or (place,) for other in rows_of[key])
    kept = [row for place, row in enumerate(rows) if place not in held]
    return kept, [rows[place] for place in sorted(held)]


def _cut(
    by_domain: dict[str, list[Conversation]], cap: int | None, *, with_twice: bool
) -> tuple[list[Conversation], list[Conversation]]:
    """At most `cap` rows a domain, at random, and as many others where every domain has them."""
    shuffled = {
        domain: [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
        for domain, rows in by_domain.items()
    }
    first = [row for rows in shuffled.values() for row in rows[:cap]]
    has_more = with_twice and cap is not None and all(len(rows) >= 2 * cap for rows in shuffled.values())
    return first, [row for rows in shuffled.values() for row in rows[cap : 2 * cap]] if has_more else []


def _check_domains(splits: dict[str, list[Conversation]]) -> None:
    found = {name: sorted({row.domain for row in rows}) for name, rows in splits.items()}
    if len(found["train"]) < 2:
        raise UserError(
            f"data.train has one domain only ({found['train'][0]}): a conflict is between two or more. Tag every row "
            'with its `domain`, or give each source of a mixture its own ("domain: document").'
        )
    for name in ("val", "test"):
        if found[name] != found["train"]:
            raise UserError(
                f"data.{name} has the domains {', '.join(found[name])}, data.train has {', '.join(found['train'])}. "
                "Every split needs rows of every domain, under the same names."
            )


def draw(section: MiniworldSection, *, copies: int = 1) -> Path:
    """Draws the scenes (training ones `copies` times as many) unless they are there; returns their folder.

    Several processes may ask at once: one draws, the others wait.
    """
    scenes = section.scenes.model_dump()
    scenes["train"] *= copies
    dial = section.model_dump(include={"clash", "cue", "grounds", "seed"})
    folder = section.folder / digest([scenes, dial, drawn_by()])
    with locked(folder.with_suffix(".lock"), wait=True):
        return clashes.write(folder, scenes, **dial)


def drawn_by() -> str:
    """A hash of the code that draws."""
    return hashlib.sha256(recipe_version().encode() + Path(clashes.__file__).read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class ScoredSet:
    """A split to score, and of each sample its source and the number of its picture."""

    cached: CachedSet
    source_N: list[str]
    picture_N: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """What is kept with the scores of every run."""
        return {
            "domain": np.array(self.cached.domains),
            "source": np.array(self.source_N),
            "picture": self.picture_N,
        }


@dataclass(frozen=True)
class StudyData:
    """Splits with their pictures embedded; the mix is the first `mixed` rows of `train`."""

    train: CachedSet
    mixed: int
    val: ScoredSet
    test: ScoredSet


def embed(base: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: StudyRows) -> StudyData:
    """Raises UserError naming a row that cannot be encoded."""
    return StudyData(
        cache(base, processor, rows.train),
        rows.mixed,
        *(_scored(base, processor, part) for part in (rows.val, rows.test)),
    )


def _scored(base: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: list[Conversation]) -> ScoredSet:
    """Rows without a picture are a cluster each."""
    numbers: dict[Any, int] = {}
    keys = [row.images or place for place, row in enumerate(rows)]
    picture_N = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    return ScoredSet(cache(base, processor, rows), [row.source for row in rows], picture_N)
