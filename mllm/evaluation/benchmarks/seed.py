"""SEED-Bench: four options over nine abilities; its questions to still pictures."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import CHOICE, Benchmark, Row
from mllm.evaluation.layouts import picture, read_json

CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def read(folder: Path, split: str) -> Iterator[Row]:
    """`SEED-Bench.json`; rows to videos are left out."""
    content = read_json(folder / "SEED-Bench.json")
    kinds = {number: name for name, number in content.get("question_type", {}).items()}
    for row in content["questions"]:
        if row["data_type"] != "image":
            continue
        yield Row(
            id=str(row["question_id"]),
            question=row["question"],
            answers=(row["answer"],),
            options=tuple(str(row[choice]) for choice in CHOICES if row.get(choice) is not None),
            images=(picture(folder, row["data_id"], ("SEED-Bench-image", "images")),),
            qtype=kinds.get(row.get("question_type_id")),
        )


BENCHMARK = Benchmark(
    title="SEED-Bench, still pictures",
    domain="general",
    home="https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
    licence="CC BY-NC 4.0; pictures: CC3M's terms",
    splits=("test",),
    files=("SEED-Bench.json",),
    pictures="SEED-Bench-image/*",
    metric="option_letter",
    reference="Li et al. 2023; exact form: option_letter_llava",
    read=read,
    prompt=CHOICE,
)
