"""GQA: compositional questions made from scene graphs."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import picture, read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """`SPLIT_balanced_questions.json`: id -> question, answer, imageId."""
    for key, row in read_json(folder / f"{split}_balanced_questions.json").items():
        yield Row(
            id=key,
            question=row["question"],
            answers=(row["answer"],),
            images=(picture(folder, f"{row['imageId']}.jpg", ("images", "")),),
            qtype=(row.get("types") or {}).get("structural"),
        )


BENCHMARK = Benchmark(
    title="GQA",
    domain="general",
    home="https://cs.stanford.edu/people/dorarad/gqa/download.html",
    licence="CC BY 4.0; pictures: Visual Genome",
    splits=("testdev", "val", "train"),
    files=("{split}_balanced_questions.json",),
    pictures="images/ID.jpg",
    metric="exact_match",
    reference="Hudson & Manning 2019; exact forms: gqa_llava, gqa_lmms_eval",
    read=read,
)
