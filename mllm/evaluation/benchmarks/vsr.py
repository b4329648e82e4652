"""VSR: is what a caption says of two things' places true?"""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import picture, read_lines


def read(folder: Path, split: str) -> Iterator[Row]:
    """`SPLIT.jsonl`: caption, label 0 or 1, relation."""
    for number, row in enumerate(read_lines(folder / f"{split}.jsonl"), 1):
        yield Row(
            id=str(number),
            question=row["caption"],
            answers=("yes" if int(row["label"]) else "no",),
            images=(picture(folder, row["image"], ("images", "trainval2017", "")),),
            qtype=row.get("relation"),
        )


BENCHMARK = Benchmark(
    title="VSR",
    domain="general",
    home="https://github.com/cambridgeltl/visual-spatial-reasoning",
    licence="Apache-2.0; pictures: COCO's terms (Flickr)",
    splits=("test", "dev", "train"),
    files=("{split}.jsonl",),
    pictures="images/*.jpg",
    metric="yes_no_accuracy",
    reference="Liu et al. 2023, accuracy",
    read=read,
    prompt="Is this true of the picture? {question}\nPlease answer yes or no.",
)
