"""TabFact as DUE ships it: is a statement true of a table that was printed as a page?"""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.benchmarks.wtq import read_due


def read(folder: Path, split: str) -> Iterator[Row]:
    """DUE's rows: the key is the statement, its value 1 or 0."""
    for name, image, key, values in read_due(folder, split):
        answer = "yes" if values[0].strip().lower() in ("1", "true", "yes") else "no"
        yield Row(id=f"{name}-{key}", question=key, answers=(answer,), images=(image,))


BENCHMARK = Benchmark(
    title="TabFact",
    domain="document",
    home="https://github.com/due-benchmark/du-schema",
    licence="CC BY 4.0",
    splits=("test", "dev", "train"),
    files=("{split}/document.jsonl",),
    pictures="png/NAME.png: the page of NAME.pdf",
    metric="yes_no_accuracy",
    reference="Chen et al. 2020; Borchmann et al. 2021 (DUE), accuracy",
    read=read,
    prompt='Is the statement true of the table? "{question}"\nPlease answer yes or no.',
)
