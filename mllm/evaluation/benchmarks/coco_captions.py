"""COCO captions on Karpathy's test split: five people's descriptions a picture."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import picture, read_json

PROMPT = "Provide a one-sentence caption for the provided image."  # LLaVA-1.5's


def read(folder: Path, split: str) -> Iterator[Row]:
    """`dataset_coco.json`: images with `filepath`, `filename`, `split` and `sentences`."""
    yield from of_karpathy(folder, folder / "dataset_coco.json", split)


def of_karpathy(folder: Path, path: Path, split: str) -> Iterator[Row]:
    """Karpathy's files as rows; `restval` belongs to training."""
    for image in read_json(path)["images"]:
        if image["split"].replace("restval", "train") == split:
            places = [*([image["filepath"]] if image.get("filepath") else []), "images", "flickr30k-images", ""]
            yield Row(
                id=str(image.get("cocoid", image.get("imgid"))),
                question=PROMPT,
                answers=tuple(" ".join(sentence["raw"].split()) for sentence in image["sentences"]),
                images=(picture(folder, image["filename"], places),),
            )


BENCHMARK = Benchmark(
    title="COCO captions, Karpathy's test",
    domain="general",
    home="https://cs.stanford.edu/people/karpathy/deepimagesent/",
    licence="CC BY 4.0; pictures: COCO's terms (Flickr)",
    splits=("test", "val", "train"),
    files=("dataset_coco.json",),
    pictures="val2014/COCO_val2014_*.jpg",
    metric="rouge_l",
    reference="Chen et al. 2015, coco-caption; CIDEr-D, BLEU and ROUGE-L among the figures",
    read=read,
    prompt="{question}",
)
