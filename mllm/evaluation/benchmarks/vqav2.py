"""VQAv2: everyday questions to COCO's pictures, ten answers each."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import commonest, picture, read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """Questions and annotations are two files, joined by `question_id`."""
    year = f"{split}2014"
    annotations = read_json(folder / f"v2_mscoco_{year}_annotations.json")["annotations"]
    questions = read_json(folder / f"v2_OpenEnded_mscoco_{year}_questions.json")["questions"]
    yield from join(questions, annotations, folder, year)


def join(questions: list[dict], annotations: list[dict], folder: Path, year: str) -> Iterator[Row]:
    """VQA's two files as rows; OK-VQA has the same."""
    by_id = {row["question_id"]: row for row in annotations}
    for question in questions:
        known = by_id[question["question_id"]]
        answers = [answer["answer"] for answer in known["answers"]]
        name = f"COCO_{year}_{question['image_id']:012d}.jpg"
        yield Row(
            id=str(question["question_id"]),
            question=question["question"],
            answers=tuple(answers),
            target=known.get("multiple_choice_answer") or commonest(answers),
            images=(picture(folder, name, (year, f"images/{year}", "images")),),
            qtype=known.get("answer_type"),
        )


BENCHMARK = Benchmark(
    title="VQAv2",
    domain="general",
    home="https://visualqa.org/download.html",
    licence="CC BY 4.0; pictures: COCO's terms (Flickr)",
    splits=("val", "train"),
    files=("v2_OpenEnded_mscoco_{split}2014_questions.json", "v2_mscoco_{split}2014_annotations.json"),
    pictures="val2014/COCO_val2014_*.jpg",
    metric="vqa_accuracy",
    reference="Goyal et al. 2017; exact forms: vqa_accuracy_official, vqa_accuracy_lmms_eval",
    read=read,
)
