"""PMC-VQA: figures of open-access articles with four options."""

import re
from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import CHOICE, Benchmark, Row
from mllm.evaluation.layouts import first_there, picture, read_table

PLACES = ("images", "figures", "images_2", "")


def read(folder: Path, split: str) -> Iterator[Row]:
    """`test_clean.csv` where it is, else `test.csv` or the second version's `test_2.csv`. Options come as " A: …"."""
    for number, row in enumerate(read_table(first_there(folder, f"{split}_clean.csv", f"{split}*.csv")), 1):
        options = [re.sub(r"^\s*[A-D]\s*:\s*", "", row[f"Choice {letter}"]).strip() for letter in "ABCD"]
        yield Row(
            id=row.get("index") or str(number),
            question=row["Question"],
            answers=((row.get("Answer_label") or row["Answer"]).strip(),),
            options=tuple(options),
            images=(picture(folder, row["Figure_path"], PLACES),),
        )


BENCHMARK = Benchmark(
    title="PMC-VQA",
    domain="biomedical",
    home="https://huggingface.co/datasets/xmcmic/PMC-VQA",
    licence="CC BY-SA 4.0",
    splits=("test", "train"),
    files=("{split}*.csv",),
    pictures="images/*.jpg",
    metric="option_letter",
    reference="Zhang et al. 2023, accuracy",
    read=read,
    prompt=CHOICE,
)
