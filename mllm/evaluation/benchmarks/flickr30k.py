"""Flickr30k captions on Karpathy's test split of 1,000 pictures."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mllm.evaluation.benchmarks import coco_captions
from mllm.evaluation.benchmarks.base import Row


def read(folder: Path, split: str) -> Iterator[Row]:
    """`dataset_flickr30k.json`, as COCO's."""
    yield from coco_captions.of_karpathy(folder, folder / "dataset_flickr30k.json", split)


BENCHMARK = replace(
    coco_captions.BENCHMARK,
    title="Flickr30k captions, Karpathy's test",
    home="https://shannon.cs.illinois.edu/DenotationGraph/",
    licence="research only, on request; pictures: Flickr",
    files=("dataset_flickr30k.json",),
    pictures="flickr30k-images/*.jpg",
    reference="Young et al. 2014; coco-caption's CIDEr-D, BLEU and ROUGE-L among the figures",
    read=read,
)
