"""AI2D: school diagrams with four options."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import CHOICE, Benchmark, Row
from mllm.evaluation.choices import LETTERS
from mllm.evaluation.layouts import picture, read_json


def read(folder: Path, split: str) -> Iterator[Row]:
    """A JSON a diagram in `questions`; `ai2d_test_ids.csv` names the test's diagrams, all others are training's."""
    root = folder / "ai2d" if (folder / "ai2d").is_dir() else folder
    tests = set((folder / "ai2d_test_ids.csv").read_text(encoding="utf-8-sig").replace(",", " ").split())
    for path in sorted(root.glob("questions/*.json"), key=lambda path: (len(path.name), path.name)):
        diagram = path.name.split(".")[0]
        if (diagram in tests) != (split == "test"):
            continue
        content = read_json(path)
        image = picture(root, content.get("imageName", f"{diagram}.png"), ("images",))
        for question, about in content["questions"].items():
            yield Row(
                id=about.get("questionId", f"{diagram}-{question}"),
                question=question,
                answers=(LETTERS[about["correctAnswer"]],),
                options=tuple(about["answerTexts"]),
                images=((root / image).relative_to(folder).as_posix(),),
                qtype="letters in the diagram" if about.get("abcLabel") else "text",
            )


BENCHMARK = Benchmark(
    title="AI2D",
    domain="document",
    home="https://prior.allenai.org/projects/diagram-understanding",
    licence="research only (AI2's licence in the archive)",
    splits=("test", "train"),
    files=("ai2d_test_ids.csv", "questions/*.json or ai2d/questions/*.json"),
    pictures="images/ID.png",
    metric="option_letter",
    reference="Kembhavi et al. 2016; exact forms: option_letter_llava, option_letter_mmbench",
    read=read,
    prompt=CHOICE,
)
