"""MMMU: college examinations with up to seven pictures a question, most of them with options."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mllm.data.formats import IMAGE_PLACE
from mllm.evaluation.benchmarks.base import CHOICE, SHORT, Benchmark, Row
from mllm.evaluation.layouts import embedded, read_parquet

MARK = re.compile(r"<image (\d)>")


def read(folder: Path, split: str) -> Iterator[Row]:
    """`SUBJECT/validation-*.parquet` as on the hub. `<image 2>` in question or options is a place of that picture; one
    that none marks stands in front.
    """
    for row in read_parquet(folder.glob(f"*/{split}-*.parquet")):
        options = row["options"] if isinstance(row["options"], list) else ast.literal_eval(row["options"] or "[]")
        has_options = row["question_type"] == "multiple-choice"
        answers = ast.literal_eval(row["answer"]) if row["answer"].startswith("[") else [row["answer"]]
        held = {str(n): embedded(row[f"image_{n}"]) for n in range(1, 8) if row.get(f"image_{n}")}
        text, *texts = [_marked(each, held) for each in (row["question"], *options)]
        marks = [mark for mark in re.findall(r"<<(\d)>>", " ".join((text, *texts))) if mark in held]
        front = [mark for mark in held if mark not in marks]
        text = f"{IMAGE_PLACE}\n" * len(front) + text
        text, *texts = [re.sub(r"<<\d>>", IMAGE_PLACE, each) for each in (text, *texts)]
        yield Row(
            id=row["id"],
            question=text,
            answers=tuple(map(str, answers)),
            options=tuple(texts) if has_options else (),
            images=tuple(held[mark] for mark in front + marks),
            qtype=row["id"].split("_", 1)[-1].rsplit("_", 1)[0],
            metric=None if has_options else "mmmu_open",
            prompt=None if has_options else SHORT,
        )


def _marked(text: str, held: dict[str, bytes]) -> str:
    """`<image 2>` as `<<2>>`; as words where the row has no such picture."""
    return MARK.sub(lambda mark: f"<<{mark[1]}>>" if mark[1] in held else f"image {mark[1]}", text)


BENCHMARK = Benchmark(
    title="MMMU",
    domain="general",
    home="https://huggingface.co/datasets/MMMU/MMMU",
    licence="Apache-2.0",
    splits=("validation", "dev"),
    files=("*/{split}-*.parquet",),
    pictures="in the parquet files",
    metric="option_letter",
    reference="Yue et al. 2024; exact forms: option_letter_mmmu, mmmu_open_official",
    read=read,
    prompt=CHOICE,
)
