"""Which questions are worth looking at: where an arm gains or loses most, or where the only arm is right and wrong."""

import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from mllm.evaluation.graded import Graded

MOST = 3  # of each kind and domain


class Picked(NamedTuple):
    """Indices of rows of one domain, the most telling first."""

    best: list[int]
    worst: list[int]


def pick_samples(graded: Mapping[str, Graded], blanked: Graded | None = None) -> dict[str, Picked]:
    """Domain -> rows. Of several arms, by the last one's score minus the first one's; of one arm, by its score, and
    among equals by what it owes to the picture, if `blanked` has the same rows. Other ties fall the same way each time.
    """
    arms = list(graded.values())
    first, last = arms[0], arms[-1]
    owed = last.scores - blanked.scores if blanked and len(blanked.rows) == len(last.rows) else last.scores
    gained = last.scores - first.scores

    def rank(index: int) -> tuple[float, float, int]:
        row = last.rows[index]
        lot = zlib.crc32(f"{row.source}/{row.id}/{row.question}".encode("utf-8", "surrogatepass"))
        telling = (gained[index], last.scores[index]) if len(graded) > 1 else (last.scores[index], owed[index])
        return (*map(float, telling), lot)

    return {domain: _ends(_rows_of(last, domain), rank) for domain in last.groups("domains")}


def _rows_of(graded: Graded, domain: str) -> list[int]:
    return [index for index, row in enumerate(graded.rows) if row.domain == domain]


def _ends(rows: list[int], rank: Callable[[int], tuple]) -> Picked:
    ordered = sorted(rows, key=rank, reverse=True)
    many = min(MOST, -(-len(ordered) // 2))
    return Picked(ordered[:many], ordered[many:][::-1][:MOST])
