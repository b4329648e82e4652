"""OK-VQA: questions to COCO's pictures that need knowledge from outside them."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.benchmarks.vqav2 import join
from mllm.evaluation.layouts import read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """As VQAv2, under names without `v2`."""
    year = f"{split}2014"
    annotations = read_json(folder / f"mscoco_{year}_annotations.json")["annotations"]
    questions = read_json(folder / f"OpenEnded_mscoco_{year}_questions.json")["questions"]
    yield from join(questions, annotations, folder, year)


BENCHMARK = Benchmark(
    title="OK-VQA",
    domain="general",
    home="https://okvqa.allenai.org/download.html",
    licence="CC BY 4.0; pictures: COCO's terms (Flickr)",
    splits=("val", "train"),
    files=("OpenEnded_mscoco_{split}2014_questions.json", "mscoco_{split}2014_annotations.json"),
    pictures="val2014/COCO_val2014_*.jpg",
    metric="vqa_accuracy",
    reference="Marino et al. 2019; VQA's rule over ten answers",
    read=read,
)
