"""TextVQA: questions that need the text in the picture; asked without OCR tokens."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import commonest, first_there, picture, read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """`TextVQA_0.5.1_SPLIT.json`: `data`, ten answers a question."""
    for row in read_json(first_there(folder, f"TextVQA_*_{split}.json"))["data"]:
        yield Row(
            id=str(row["question_id"]),
            question=row["question"],
            answers=tuple(row["answers"]),
            target=commonest(row["answers"]),
            images=(picture(folder, f"{row['image_id']}.jpg", ("train_images", "images")),),
        )


BENCHMARK = Benchmark(
    title="TextVQA",
    domain="general",
    home="https://textvqa.org/dataset",
    licence="CC BY 4.0; pictures: Open Images (CC BY 2.0)",
    splits=("val", "train"),
    files=("TextVQA_*_{split}.json",),
    pictures="train_images/ID.jpg",
    metric="vqa_accuracy",
    reference="Singh et al. 2019; LLaVA m4c_evaluator.py, without OCR tokens in the prompt",
    read=read,
)
