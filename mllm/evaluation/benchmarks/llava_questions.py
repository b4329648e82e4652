"""LLaVA's question files, such as LLaVA-Bench (in the wild): the prompt as it stands, no judge."""

from collections.abc import Iterator
from pathlib import Path

from mllm.common.errors import UserError
from mllm.evaluation.benchmarks.base import Benchmark, Row
from mllm.evaluation.layouts import picture, read_lines


def read(folder: Path, split: str) -> Iterator[Row]:
    """`questions.jsonl` with `question_id`, `image`, `text`. Answers are a line's own `answer`, `answers` or `label`,
    or those of `answers_gpt4.jsonl` and `answers.jsonl`, by `question_id`.
    """
    known = {}
    for name in ("answers_gpt4.jsonl", "answers.jsonl"):
        if (folder / name).is_file():
            known |= {line["question_id"]: line["text"] for line in read_lines(folder / name)}
    for line in read_lines(folder / "questions.jsonl"):
        own = line.get("answers") or line.get("answer") or line.get("label") or known.get(line["question_id"])
        if own is None:
            raise UserError(
                f"{folder / 'questions.jsonl'}: question {line['question_id']} has no answer to score by. Give one in "
                "its line (`answer`), or all in answers.jsonl."
            )
        yield Row(
            id=str(line["question_id"]),
            question=line["text"],
            answers=tuple(map(str, own)) if isinstance(own, list) else (str(own),),
            images=(picture(folder, line["image"], ("images", "")),) if line.get("image") else (),
            qtype=line.get("category"),
        )


BENCHMARK = Benchmark(
    title="LLaVA's question files",
    domain="general",
    home="https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
    licence="CC BY-NC 4.0 (LLaVA-Bench); otherwise the file's",
    splits=("test",),
    files=("questions.jsonl",),
    pictures="images/*",
    metric="rouge_l",
    reference="Liu et al. 2023, without its judge: likeness to GPT-4's answers",
    read=read,
    prompt="{question}",
)
