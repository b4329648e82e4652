"""ChartQA: questions to charts, written by people or made from their text."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import picture, read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """`SPLIT/SPLIT_human.json` and `SPLIT_augmented.json`, pictures in `SPLIT/png`."""
    for kind in ("human", "augmented"):
        for number, row in enumerate(read_json(folder / split / f"{split}_{kind}.json"), 1):
            yield Row(
                id=f"{kind}-{number}",
                question=row["query"],
                answers=(str(row["label"]),),
                images=(picture(folder, row["imgname"], (f"{split}/png",)),),
                qtype=kind,
            )


BENCHMARK = Benchmark(
    title="ChartQA",
    domain="document",
    home="https://github.com/vis-nlp/ChartQA",
    licence="GPL-3.0",
    splits=("test", "val", "train"),
    files=("{split}/{split}_human.json", "{split}/{split}_augmented.json"),
    pictures="test/png/*.png",
    metric="relaxed_accuracy",
    reference="Masry et al. 2022; exact form: relaxed_accuracy_official",
    read=read,
)
