"""VQA-RAD: radiologists' questions to radiographs, open and closed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import embedded, picture, read_json, read_parquet

PUBLIC = "VQA_RAD Dataset Public.json"
PLACES = ("VQA_RAD Image Folder", "images", "")


def read(folder: Path, split: str) -> Iterator[Row]:
    """The publisher's JSON, whose `phrase_type` tells the split, or else the hub's parquet files, which do not tell
    open from closed: there an answer of yes or no is a closed one.
    """
    found = sorted(folder.glob("VQA_RAD*Public.json"))
    if found:
        for row in read_json(found[0]):
            if row["phrase_type"].startswith("test") == (split == "test"):
                image = picture(folder, row["image_name"], PLACES)
                yield _row(str(row["qid"]), row["question"], row["answer"], image, row["answer_type"].strip().upper())
        return
    paths = [*folder.glob(f"data/{split}-*.parquet"), *folder.glob(f"{split}-*.parquet")]
    for number, row in enumerate(read_parquet(paths), 1):
        kind = "CLOSED" if row["answer"].strip().lower() in ("yes", "no") else "OPEN"
        yield _row(str(number), row["question"], row["answer"], embedded(row["image"]), kind)


def _row(number: str, question: str, answer: str | int, image: str | bytes, kind: str) -> Row:
    return open_or_closed(Row(id=number, question=question, answers=(str(answer).strip(),), images=(image,)), kind)


def open_or_closed(row: Row, kind: str) -> Row:
    """The row graded as LLaVA-Med groups questions: closed ones by accuracy, open ones by recall."""
    closed = kind == "CLOSED"
    return replace(row, qtype="closed" if closed else "open", metric="closed_accuracy" if closed else "open_recall")


BENCHMARK = Benchmark(
    title="VQA-RAD",
    domain="biomedical",
    home="https://osf.io/89kps/",
    licence="CC0 1.0",
    splits=("test", "train"),
    files=("VQA_RAD*Public.json or data/{split}-*.parquet or {split}-*.parquet",),
    pictures="VQA_RAD Image Folder/*.jpg, or in the parquet files",
    metric="open_recall",
    reference="Lau et al. 2018; exact forms: open_recall_llava_med, closed_accuracy_llava_med",
    read=read,
)
