"""PathVQA: questions to pictures of pathology, half of them yes or no."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.benchmarks.vqa_rad import open_or_closed
from mllm.evaluation.layouts import embedded, picture, read_parquet, read_plain_pickle


def read(folder: Path, split: str) -> Iterator[Row]:
    """The publisher's `qas/SPLIT/SPLIT_qa.pkl` (older archives: `qas/SPLIT_qa.pkl`), plain values only, or the hub's
    parquet files.
    """
    places = (folder / "qas" / split / f"{split}_qa.pkl", folder / "qas" / f"{split}_qa.pkl")
    pickles = [path for path in places if path.is_file()]
    if pickles:
        rows = (
            (row["question"], row["answer"], picture(folder, f"{row['image']}.jpg", (f"images/{split}", "images")))
            for row in read_plain_pickle(pickles[0])
        )
    else:
        paths = [*folder.glob(f"data/{split}-*.parquet"), *folder.glob(f"{split}-*.parquet")]
        rows = ((row["question"], row["answer"], embedded(row["image"])) for row in read_parquet(paths))
    for number, (question, answer, image) in enumerate(rows, 1):
        kind = "CLOSED" if answer.strip().lower() in ("yes", "no") else "OPEN"
        yield open_or_closed(Row(id=str(number), question=question, answers=(answer,), images=(image,)), kind)


BENCHMARK = Benchmark(
    title="PathVQA",
    domain="biomedical",
    home="https://github.com/UCSD-AI4H/PathVQA",
    licence="MIT; pictures: of textbooks and a library (PEIR)",
    splits=("test", "val", "train"),
    files=("qas/{split}/{split}_qa.pkl or qas/{split}_qa.pkl or data/{split}-*.parquet or {split}-*.parquet",),
    pictures="images/test/*.jpg, or in the parquet files",
    metric="open_recall",
    reference="He et al. 2020; exact forms: open_recall_llava_med, closed_accuracy_llava_med",
    read=read,
)
