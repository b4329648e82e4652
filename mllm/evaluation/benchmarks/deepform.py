"""DeepForm as DUE ships it: fields of invoices of political advertisements on television."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.benchmarks.wtq import read_due


def read(folder: Path, split: str) -> Iterator[Row]:
    """DUE's rows: the key is the field, its values are one of them each. Only the first page is asked about."""
    for name, image, key, values in read_due(folder, split):
        field = key.replace("_", " ")
        yield Row(id=f"{name}-{key}", question=field, answers=tuple(values) or ("None",), images=(image,), qtype=key)


BENCHMARK = Benchmark(
    title="DeepForm",
    domain="document",
    home="https://github.com/due-benchmark/du-schema",
    licence="CC0 1.0",
    splits=("test", "dev", "train"),
    files=("{split}/document.jsonl",),
    pictures="png/NAME.png: the first page of NAME.pdf",
    metric="field_f1",
    reference="Svetlichnaya 2020; Borchmann et al. 2021 (DUE), F1 over fields",
    read=read,
    prompt='What is the value for the "{question}"? Answer "None" if the form does not give it.',
)
