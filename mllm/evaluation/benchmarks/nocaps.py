"""NoCaps: captions of objects that COCO's have no words for, ten a picture."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mllm.evaluation.benchmarks import coco_captions
from mllm.evaluation.benchmarks.base import Row
from mllm.evaluation.layouts import picture, read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """`nocaps_val_4500_captions.json` in COCO's layout; `domain` tells how far from COCO's objects."""
    content = read_json(folder / "nocaps_val_4500_captions.json")
    captions = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"].strip())
    for image in content["images"]:
        yield Row(
            id=str(image["id"]),
            question=coco_captions.PROMPT,
            answers=tuple(captions[image["id"]]),
            images=(picture(folder, image["file_name"], ("images", "val", "validation")),),
            qtype=image.get("domain"),
        )


BENCHMARK = replace(
    coco_captions.BENCHMARK,
    title="NoCaps",
    home="https://nocaps.org/download",
    licence="CC BY 2.0",
    splits=("val",),
    files=("nocaps_val_4500_captions.json",),
    pictures="images/*.jpg",
    reference="Agrawal et al. 2019; coco-caption's CIDEr-D, BLEU and ROUGE-L among the figures",
    read=read,
)
