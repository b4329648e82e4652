"""MME: two yes/no questions a picture, in fourteen subtasks of perception and cognition."""

from collections.abc import Iterator
from pathlib import Path

from mllm.common.errors import UserError
from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.figures import COGNITION, PERCEPTION

SUFFIXES = (".jpg", ".png", ".jpeg")


def read(folder: Path, split: str) -> Iterator[Row]:
    """A folder a subtask; a text file a picture, two lines of `question TAB answer`. Some subtasks keep them apart, in
    `images` and `questions_answers_YN`.
    """
    for task in (*PERCEPTION, *COGNITION):
        texts = folder / task / "questions_answers_YN"
        pictures = folder / task / "images" if texts.is_dir() else folder / task
        for path in sorted((texts if texts.is_dir() else folder / task).glob("*.txt")):
            names = [f"{path.stem}{suffix}" for suffix in SUFFIXES]
            name = next((each for each in names if (pictures / each).is_file()), names[0])
            image = (pictures / name).relative_to(folder).as_posix()
            lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            if len(lines) != 2:
                raise UserError(f"{path}: expected two questions, got {len(lines)} lines.")
            for number, line in enumerate(lines, 1):
                question, answer = line.rsplit("\t", 1)
                yield Row(
                    id=f"{task}-{path.stem}-{number}",
                    question=question,
                    answers=(answer.strip(),),
                    images=(image,),
                    qtype=task,
                )


BENCHMARK = Benchmark(
    title="MME: perception and cognition by yes and no",
    domain="general",
    home="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
    licence="research only, on request",
    splits=("test",),
    files=("*/*.txt or */questions_answers_YN/*.txt",),
    pictures="SUBTASK/*.jpg or SUBTASK/images/*",
    metric="mme",
    reference="Fu et al. 2023, eval_tool/calculation.py",
    read=read,
    prompt="{question}",
)
