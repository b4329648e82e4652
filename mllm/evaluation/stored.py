"""Answers that are there already, ours or anybody's, to a report: no model is needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mllm.common.folders import check_writable
from mllm.data.conversation import Conversation
from mllm.data.mixture import load_mixture
from mllm.evaluation.answers import read_answers, read_recipe
from mllm.evaluation.benchmarks import Selection
from mllm.evaluation.questions import read_questions
from mllm.evaluation.recipe import Recipe
from mllm.evaluation.report import Arm, build_report, write_report
from mllm.evaluation.tables import print_report


def score_files(
    files: Mapping[str, Path],
    questions: Path | Selection | None,
    out: Path | None,
    *,
    train_rows: Path | None = None,
    image_root: Path | None = None,
    limit: int | None = None,
) -> dict:
    """Scores stored answers, prints the tables and, if `out` is given, writes the report.

    Args:
        files: arm name -> answers in LLaVA's JSONL. NAME.blanked.jsonl beside NAME.jsonl is taken for its blanked ones.
        questions: what they answer, a file or benchmarks; without it, the labels are those our own answer files carry.

    Raises:
        UserError: as `mllm.evaluation.answers.read_answers`, or the arms answer different questions.
    """
    if out is not None:
        check_writable(out, "--out")
    rows = None
    if questions:
        rows = read_questions(questions, image_root=image_root, limit=limit, check_files=False)
    arms = {name: score_file(path, rows, split=(questions or path).stem) for name, path in files.items()}
    report = build_report(arms, load_mixture(train_rows) if train_rows else [])
    report["about"] = {"answers": {name: path.name for name, path in files.items()}}
    report["about"] |= {"questions": questions.name} if questions else {}
    if out:
        write_report(report, arms, out)
    print_report(report)
    return report


def score_file(path: Path, rows: Sequence[Conversation] | None, *, split: str) -> Arm:
    """An answers file as an arm. Without `rows`, its own labels are taken."""
    answers, unseen = read_answers(path, rows), path.with_suffix(".blanked.jsonl")
    recipe = Recipe.of_answers(answers, split=split, known=read_recipe(path))
    return Arm(answers=answers, blanked=read_answers(unseen, rows) if unseen.is_file() else None, recipe=recipe)
