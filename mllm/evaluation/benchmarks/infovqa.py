"""InfographicVQA: questions to infographics."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import first_there, picture, read_json

PLACES = ("infographicsvqa_images", "images", "")


def read(folder: Path, split: str) -> Iterator[Row]:
    """`infographicsVQA_SPLIT_v1.0_withQT.json` (some releases leave out the s, or QT): `data`."""
    for row in read_json(first_there(folder, f"infographic*VQA_{split}_v1.0*.json"))["data"]:
        kinds = row.get("answer_type") or []
        yield Row(
            id=str(row["questionId"]),
            question=row["question"],
            answers=tuple(row["answers"]),
            images=(picture(folder, row["image_local_name"], PLACES),),
            qtype=kinds[0] if len(kinds) == 1 else "several kinds" if kinds else None,
        )


BENCHMARK = Benchmark(
    title="InfographicVQA",
    domain="document",
    home="https://rrc.cvc.uab.es/?ch=17",
    licence="research only, after registration",
    splits=("val", "train"),
    files=("infographic*VQA_{split}_v1.0*.json",),
    pictures="infographicsvqa_images/*",
    metric="anls",
    reference="Mathew et al. 2022; exact form: anls_official",
    read=read,
)
