"""VizWiz: what blind people asked about pictures they took; some cannot be answered."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import commonest, picture, read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """`SPLIT.json`, or `Annotations/SPLIT.json` as the archive has it."""
    path = folder / f"{split}.json"
    for row in read_json(path if path.is_file() else folder / "Annotations" / f"{split}.json"):
        answers = [answer["answer"] for answer in row["answers"]]
        yield Row(
            id=row["image"],
            question=row["question"],
            answers=tuple(answers),
            target=commonest(answers),
            images=(picture(folder, row["image"], (split, "images")),),
            qtype=row.get("answer_type"),
        )


BENCHMARK = Benchmark(
    title="VizWiz-VQA",
    domain="general",
    home="https://vizwiz.org/tasks-and-datasets/vqa/",
    licence="CC BY 4.0",
    splits=("val", "train"),
    files=("{split}.json or Annotations/{split}.json",),
    pictures="val/*.jpg",
    metric="vqa_accuracy",
    reference="Gurari et al. 2018; VQA's rule over ten answers",
    read=read,
    prompt="{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
)
