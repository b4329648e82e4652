"""POPE: is that object in the picture? Asks for what is there and for what is not."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import picture, read_lines

KINDS = ("random", "popular", "adversarial")
PLACES = ("val2014", "images", "coco/val2014", "")


def read(folder: Path, split: str) -> Iterator[Row]:
    """Labels from `coco_pope_KIND.json`; where LLaVA's `llava_pope_test.jsonl` lies beside them, its ids are kept.

    The two are joined by picture and words, not by their order, which is what LLaVA's script goes by.
    """
    ids = {}
    if (folder / "llava_pope_test.jsonl").is_file():
        for line in read_lines(folder / "llava_pope_test.jsonl"):
            ids[line["category"], line["image"], line["text"].split("\n")[0]] = line["question_id"]
    for kind in KINDS:
        for path in sorted({*folder.glob(f"*_pope_{kind}.json"), *folder.glob(f"coco/*_pope_{kind}.json")}):
            for line in read_lines(path):
                number = ids.get((kind, line["image"], line["text"]), line["question_id"])
                yield Row(
                    id=f"{kind}-{number}",
                    question=line["text"],
                    answers=(line["label"],),
                    images=(picture(folder, line["image"], PLACES),),
                    qtype=kind,
                )


BENCHMARK = Benchmark(
    title="POPE: asking for objects that are not there",
    domain="general",
    home="https://github.com/AoiDragon/POPE",
    licence="MIT; pictures: COCO's terms (Flickr)",
    splits=("test",),
    files=("*_pope_random.json or coco/*_pope_random.json",),
    pictures="val2014/COCO_val2014_*.jpg",
    metric="pope",
    reference="Li et al. 2023, evaluate.py; LLaVA eval_pope.py",
    read=read,
    prompt="{question}\nAnswer the question using a single word or phrase.",
)
