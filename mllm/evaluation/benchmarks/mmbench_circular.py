"""MMBench as its paper scores it: each question in all rotations of its options, right only if all are."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mllm.evaluation.benchmarks import mmbench
from mllm.evaluation.benchmarks.base import Row
from mllm.evaluation.choices import LETTERS
from mllm.evaluation.figures import CIRCLE


def read(folder: Path, split: str) -> Iterator[Row]:
    """MMBench's rows, then for each its rotations. Files that hold rotations already (an index of a million and more)
    are taken as they are.
    """
    for row in mmbench.read(folder, split):
        own = int(row.id) < CIRCLE
        for shift in range(len(row.options) if own else 1):
            right = (LETTERS.index(row.answers[0]) - shift) % len(row.options)
            yield replace(
                row,
                id=str(int(row.id) + shift * CIRCLE),
                options=row.options[shift:] + row.options[:shift],
                answers=(LETTERS[right],),
            )


BENCHMARK = replace(
    mmbench.BENCHMARK,
    title="MMBench, circular",
    lies_in="mmbench",
    metric="option_letter_circular",
    reference="Liu et al. 2023, CircularEval",
    read=read,
)
