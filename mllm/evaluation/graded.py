"""Answers with their scores: grouped by domain or source, compared row by row, resampled by picture.

R rows of a group, M resamples.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mllm.common.errors import UserError
from mllm.evaluation.answers import Answer
from mllm.evaluation.intervals import bootstrap_means, interval

LEVELS = {"domains": "domain", "sources": "source"}


@dataclass(frozen=True)
class Graded:
    """Rows with their scores, in the same order."""

    rows: list[Answer]
    scores: np.ndarray

    def part(self, level: str, group: str) -> "Graded":
        """The rows of one domain or source."""
        chosen = [index for index, row in enumerate(self.rows) if getattr(row, LEVELS[level]) == group]
        return Graded([self.rows[index] for index in chosen], self.scores[chosen])

    def minus(self, other: "Graded") -> "Graded":
        """Each row's score minus the same row's in `other`."""
        return Graded(self.rows, self.scores - other.scores)

    def groups(self, level: str) -> list[str]:
        """Names of the domains or sources, in alphabetical order."""
        return sorted({getattr(row, LEVELS[level]) for row in self.rows})

    def resampled(self, seed: int, group: str) -> np.ndarray:
        """Bootstrapped means [M]. Every group has a random stream of its own, so that its interval does not depend on
        what else is reported.
        """
        rng = np.random.default_rng([seed, zlib.crc32(group.encode())])
        return bootstrap_means(self.scores, [row.picture for row in self.rows], rng=rng)


def grade(answers: Sequence[Answer]) -> Graded:
    """The rows that have a metric, scored."""
    rows = [row for row in answers if row.graded]
    return Graded(rows, np.array([row.grade() for row in rows]))


def check_paired(graded: Mapping[str, Graded]) -> None:
    """Raises UserError where there is nothing graded, or where arms answered other questions or in another order."""
    (first_name, first), *others = graded.items()
    if not first.rows:
        raise UserError("there is no graded row to report on: every row's metric is 'not_graded', or there are none")
    for name, other in others:
        if len(other.rows) != len(first.rows):
            raise UserError(f"arm '{name}' has {len(other.rows)} graded answers, '{first_name}' {len(first.rows)}")
        for one, two in zip(first.rows, other.rows, strict=True):
            if (one.source, one.id, one.question) != (two.source, two.id, two.question):
                raise UserError(
                    f"arms must answer the same questions in the same order: where '{first_name}' has row '{one.id}' "
                    f"of {one.source}, '{name}' has row '{two.id}' of {two.source}"
                )


def difference(value: float, means_M: np.ndarray) -> dict[str, float]:
    """A difference with its 95 % interval."""
    low, high = interval(means_M)
    return {"difference": float(value), "ci_low": low, "ci_high": high}
