"""ScienceQA: school science with several options, half of it with a picture."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import CHOICE, Benchmark, Row
from mllm.evaluation.choices import LETTERS
from mllm.evaluation.layouts import picture, read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """`problems.json` in the order of `pid_splits.json`; a hint stands before the question, as LLaVA asks it."""
    problems = read_json(folder / "problems.json")
    for key in read_json(folder / "pid_splits.json")[split]:
        problem = problems[key]
        hint = f"Context: {problem['hint'].strip()}\n" if problem.get("hint", "").strip() else ""
        image = problem.get("image")
        yield Row(
            id=key,
            question=hint + problem["question"],
            answers=(LETTERS[problem["answer"]],),
            options=tuple(problem["choices"]),
            images=(picture(folder, f"{key}/{image}", (split, f"images/{split}", "images")),) if image else (),
            qtype="picture" if image else "text",
        )


BENCHMARK = Benchmark(
    title="ScienceQA",
    domain="general",
    home="https://github.com/lupantech/ScienceQA",
    licence="CC BY-NC-SA 4.0",
    splits=("test", "val", "train"),
    files=("problems.json", "pid_splits.json"),
    pictures="test/ID/image.png",
    metric="option_letter",
    reference="Lu et al. 2022; exact form: option_letter_llava",
    read=read,
    prompt=CHOICE,
)
