"""What a score is a score of, in one short id: numbers whose recipes differ are answers to different questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from mllm.common.digests import digest
from mllm.data.conversation import Conversation
from mllm.evaluation.metrics import DEFAULT_METRIC, SCORER_VERSION

SEEN, BLANKED = "seen", "blanked"


class Question(Protocol):
    """What a recipe needs of a row: a `Conversation` has it, and an `Answer`."""

    source: str
    id: str
    metric: str | None
    answers: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything but the model that a score depends on. None where nobody can tell, as of answers made elsewhere."""

    set: str  # its sources
    split: str  # the questions' file
    n: int
    rows: str  # hash of ids, metrics and accepted answers
    prompt: str | None = None  # hash of the words asked and the names of the pictures, in their order
    template: str | None = None  # hash of the chat template
    decoding: str | None = None
    pictures: str = SEEN
    scorer: str = SCORER_VERSION

    @classmethod
    def of(cls, rows: Sequence[Conversation], *, split: str, template: str | None, decoding: str | None) -> Recipe:
        """The recipe of answers to these questions, asked by us."""
        return replace(
            cls.of_answers(rows, split=split),
            prompt=digest([[_as_asked(row), [path.name for path in row.images]] for row in rows]),
            template=template and digest([template]),
            decoding=decoding,
        )

    @classmethod
    def of_answers(cls, rows: Sequence[Question], *, split: str, known: Recipe | None = None) -> Recipe:
        """The recipe of answers that are there already; how they were asked, `known` tells as far as it fits."""
        recipe = cls(
            set=", ".join(sorted({row.source for row in rows})),
            split=split,
            n=len(rows),
            rows=digest([[row.source, row.id, row.metric or DEFAULT_METRIC, row.answers] for row in rows]),
        )
        if known is None:
            return recipe
        if known.rows == recipe.rows:
            return replace(known, scorer=SCORER_VERSION)
        return replace(recipe, template=known.template, decoding=known.decoding, pictures=known.pictures)

    @property
    def id(self) -> str:
        """Ten hexadecimal digits."""
        return digest([asdict(self)])

    @property
    def asked(self) -> str:
        """Hash of what the replies depend on; how they are graded may change without asking again."""
        return digest([self.prompt, self.template, self.decoding, self.pictures])

    def blanked(self) -> Recipe:
        """The same with every picture emptied."""
        return replace(self, pictures=BLANKED)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id} | asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Recipe:
        """Read back."""
        return cls(**{key: value for key, value in record.items() if key != "id"})


def _as_asked(row: Conversation) -> list[list[str]]:
    turns = row.turns[:-1] if row.turns[-1].role == "assistant" else row.turns
    return [[turn.role, turn.text] for turn in turns]


def describe(recipe: dict[str, Any]) -> str:
    """A recipe as one line."""
    unknown = "unknown"
    return (
        f"{recipe['n']} questions of {recipe['split']} ({recipe['set']}; rows {recipe['rows']}), "
        f"prompt {recipe['prompt'] or unknown}, template {recipe['template'] or unknown}, "
        f"decoding {recipe['decoding'] or unknown}, pictures {recipe['pictures']}, scorer {recipe['scorer']}"
    )
