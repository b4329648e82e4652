"""SLAKE's Chinese half. Words are not told apart by blanks there, so that all is graded by equality."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mllm.evaluation.benchmarks import slake
from mllm.evaluation.benchmarks.base import Row


def read(folder: Path, split: str) -> Iterator[Row]:
    """As SLAKE."""
    for row in slake.of_language(folder, split, "zh"):
        yield replace(row, metric=None)


BENCHMARK = replace(
    slake.BENCHMARK,
    title="SLAKE, Chinese",
    lies_in="slake",
    metric="exact_match",
    reference="Liu et al. 2021, accuracy",
    read=read,
    prompt="{question}\n用一个词或短语回答。",
)
