"""WikiTableQuestions as DUE ships it: questions to tables that were printed as pages."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import picture, read_lines

PLACES = ("png", "images", "")


def read(folder: Path, split: str) -> Iterator[Row]:
    """DUE's rows: the key is the question, its values one answer or the parts of one."""
    for name, image, key, values in read_due(folder, split):
        yield Row(id=f"{name}-{key}", question=key, answers=(", ".join(values),), images=(image,))


def read_due(folder: Path, split: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """(document, picture, key, values) of `SPLIT/document.jsonl`. DUE ships pages as PDF: draw the first page of each
    NAME.pdf as png/NAME.png, for instance with `pdftoppm -png -singlefile`.
    """
    for document in read_lines(folder / split / "document.jsonl"):
        image = picture(folder, f"{document['name']}.png", (*PLACES, f"{split}/png"))
        for annotation in document["annotations"]:
            values = [value["value"] for value in annotation["values"]]
            yield document["name"], image, annotation["key"], values


BENCHMARK = Benchmark(
    title="WikiTableQuestions",
    domain="document",
    home="https://github.com/due-benchmark/du-schema",
    licence="CC BY-SA 4.0",
    splits=("test", "dev", "train"),
    files=("{split}/document.jsonl",),
    pictures="png/NAME.png: the page of NAME.pdf",
    metric="exact_match",
    reference="Pasupat & Liang 2015; Borchmann et al. 2021 (DUE), accuracy",
    read=read,
)
