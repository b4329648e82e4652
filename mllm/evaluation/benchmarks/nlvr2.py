"""NLVR2: is a sentence true of two pictures together?"""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import picture, read_lines


def read(folder: Path, split: str) -> Iterator[Row]:
    """`SPLIT.json`, one record a line; the pictures of `dev-10-0-1` are `dev-10-0-img0.png` and `…img1.png`."""
    for row in read_lines(folder / f"{split}.json"):
        pair = row["identifier"].rsplit("-", 1)[0]
        places = (split, f"images/{split}", *([f"images/train/{row['directory']}"] if "directory" in row else []))
        yield Row(
            id=row["identifier"],
            question=row["sentence"],
            answers=("yes" if str(row["label"]).lower() == "true" else "no",),
            images=tuple(picture(folder, f"{pair}-img{side}.png", places) for side in (0, 1)),
        )


BENCHMARK = Benchmark(
    title="NLVR2",
    domain="general",
    home="https://github.com/lil-lab/nlvr",
    licence="CC BY 4.0; pictures: of the web, on request",
    splits=("test1", "dev", "train"),
    files=("{split}.json",),
    pictures="test1/*-img0.png, *-img1.png",
    metric="yes_no_accuracy",
    reference="Suhr et al. 2019, accuracy",
    read=read,
    prompt="{question}\nIs this true of the two pictures? Please answer yes or no.",
)
