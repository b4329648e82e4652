"""SLAKE: questions to radiographs and scans; its English half."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.benchmarks.vqa_rad import open_or_closed
from mllm.evaluation.layouts import picture, read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """`SPLIT.json` (the archive calls validation `validate` or `validation`), pictures in `imgs`."""
    yield from of_language(folder, split, "en")


def of_language(folder: Path, split: str, language: str) -> Iterator[Row]:
    """The rows in one language, `en` or `zh`."""
    for row in read_json(folder / f"{split}.json"):
        if row["q_lang"] == language:
            image = picture(folder, row["img_name"], ("imgs", "images"))
            plain = Row(id=str(row["qid"]), question=row["question"], answers=(str(row["answer"]),), images=(image,))
            yield open_or_closed(plain, row["answer_type"].strip().upper())


BENCHMARK = Benchmark(
    title="SLAKE, English",
    domain="biomedical",
    home="https://www.med-vqa.com/slake/",
    licence="CC BY 4.0",
    splits=("test", "validate", "validation", "train"),
    files=("{split}.json", "imgs/*"),
    pictures="imgs/xmlabN/source.jpg",
    metric="open_recall",
    reference="Liu et al. 2021; exact forms: open_recall_llava_med, closed_accuracy_llava_med",
    read=read,
)
