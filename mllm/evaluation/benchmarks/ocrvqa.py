"""OCR-VQA: questions to covers of books."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import picture, read_json

SPLITS = {"train": 1, "val": 2, "test": 3}


def read(folder: Path, split: str) -> Iterator[Row]:
    """`dataset.json`: id -> imageURL, questions, answers, split as 1, 2, 3. The picture has its address's suffix, or
    LLaVA's `.jpg`.
    """
    for key, book in read_json(folder / "dataset.json").items():
        if book["split"] != SPLITS[split]:
            continue
        image = picture(folder, f"{key}{PurePosixPath(book['imageURL']).suffix}", ("images",))
        image = image if (folder / image).is_file() else picture(folder, f"{key}.jpg", ("images",))
        for number, (question, answer) in enumerate(zip(book["questions"], book["answers"], strict=True), 1):
            yield Row(id=f"{key}-{number}", question=question, answers=(str(answer),), images=(image,))


BENCHMARK = Benchmark(
    title="OCR-VQA",
    domain="document",
    home="https://ocr-vqa.github.io/",
    licence="research only; covers: their publishers'",
    splits=("test", "val", "train"),
    files=("dataset.json",),
    pictures="images/ID.jpg",
    metric="exact_match",
    reference="Mishra et al. 2019, accuracy; exact form: gqa_llava",
    read=read,
)
