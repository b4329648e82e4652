"""DocVQA: questions to scanned pages."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import first_there, picture, read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """`SPLIT_v1.0_withQT.json` or `SPLIT_v1.0.json`: `data`, several accepted answers a question."""
    for row in read_json(first_there(folder, f"{split}_v1.0_withQT.json", f"{split}_v1.0*.json"))["data"]:
        kinds = row.get("question_types") or []
        yield Row(
            id=str(row["questionId"]),
            question=row["question"],
            answers=tuple(row["answers"]),
            images=(picture(folder, row["image"].rsplit("/", 1)[-1], ("documents", "spdocvqa_images", split)),),
            qtype=kinds[0] if len(kinds) == 1 else "several kinds" if kinds else None,
        )


BENCHMARK = Benchmark(
    title="DocVQA",
    domain="document",
    home="https://rrc.cvc.uab.es/?ch=17",
    licence="research only, after registration; pages: UCSF Industry Documents Library",
    splits=("val", "train"),
    files=("{split}_v1.0*.json",),
    pictures="documents/*.png",
    metric="anls",
    reference="Mathew et al. 2021; exact form: anls_official",
    read=read,
)
