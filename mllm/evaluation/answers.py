"""One graded reply, and the files replies are kept in."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm.common.errors import UserError
from mllm.data.conversation import Conversation
from mllm.evaluation.metrics import DEFAULT_METRIC, NOT_GRADED, collapse, score
from mllm.evaluation.recipe import Recipe


@dataclass(frozen=True)
class Answer:
    """A model's reply to one question, with all that grading and grouping need."""

    id: str
    source: str
    domain: str
    metric: str
    answers: tuple[str, ...]  # all accepted ones
    question: str  # as asked, without image placeholders
    prediction: str
    qtype: str = ""
    image: str = ""  # questions on one picture are not independent; intervals resample pictures
    where: str = "row"  # file and row, for messages
    options: tuple[str, ...] = ()  # what was to be chosen from, the first is A

    def grade(self) -> float:
        """The grade in [0, 1] by the row's own metric. Raises UserError, naming the row, if it cannot be graded."""
        try:
            return score(self.metric, self.prediction, self.answers, self.options)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error

    @property
    def graded(self) -> bool:
        return self.metric != NOT_GRADED

    @property
    def picture(self) -> str:
        """What the bootstrap resamples: the picture asked about, or the question itself where there is none."""
        return self.image or f"{self.source}/{self.id}/{self.question}"


def collect_answers(conversations: Iterable[Conversation], predictions: Sequence[str]) -> list[Answer]:
    """Replies put beside what was asked: the last question of each conversation, its answers and labels.

    A conversation without a metric is graded by exact match.
    """
    return [
        Answer(
            id=conversation.id,
            source=conversation.source,
            domain=conversation.domain,
            metric=conversation.metric or DEFAULT_METRIC,
            answers=tuple(conversation.answers),
            question=conversation.question,
            prediction=prediction,
            qtype=conversation.qtype or "",
            image=str(conversation.images[0]) if conversation.images else "",
            where=conversation.where,
            options=tuple(conversation.options),
        )
        for conversation, prediction in zip(conversations, predictions, strict=True)
    ]


def check_gradable(conversations: Iterable[Conversation]) -> None:
    """Raises UserError for the first row whose metric is unknown or does not fit its answers.

    Worth doing before a model spends hours on replies that cannot be graded.
    """
    conversations = list(conversations)
    for answer in collect_answers(conversations, [""] * len(conversations)):
        if answer.graded:
            answer.grade()


def write_answers(path: Path, answers: Iterable[Answer], *, model_id: str, recipe: Recipe | None = None) -> None:
    """One JSON object a line with the keys of LLaVA's answer files, so that its scripts and viewers read them.

    The recipe, where it is known, lies beside them as <name>.recipe.json. The file is replaced at once.
    """
    lines = [answer_line(answer, row, model_id=model_id, recipe=recipe) for row, answer in enumerate(answers)]
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, path)
    if recipe:
        recipe_path(path).write_text(json.dumps(recipe.to_json(), indent=1) + "\n", encoding="utf-8")


def answer_line(answer: Answer, row: int, *, model_id: str, recipe: Recipe | None) -> str:
    """A reply as a line of an answers file; `row` is the question's place among those asked."""
    key = f"{model_id}/{answer.source}/{answer.id}/{answer.question}"
    record = {
        "question_id": answer.id,
        "prompt": answer.question,
        "text": answer.prediction,
        "answer_id": hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:22],  # the same in every run
        "model_id": model_id,
        "metadata": {
            "source": answer.source,
            "domain": answer.domain,
            "qtype": answer.qtype,
            "metric": answer.metric,
            "answers": list(answer.answers),
            **({"options": list(answer.options)} if answer.options else {}),
            "image": answer.image,
            "row": row,
            "recipe": recipe and recipe.id,
            "score": answer.grade() if answer.graded else None,
        },
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def recipe_path(answers: Path) -> Path:
    return answers.with_suffix(".recipe.json")


def read_recipe(answers: Path) -> Recipe | None:
    """What the answers of a file are answers to, where that lies beside them."""
    path = recipe_path(answers)
    return Recipe.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def read_answers(path: Path, questions: Sequence[Conversation] | None = None) -> list[Answer]:
    """The answers of a file: ours as they stand, or anybody's in LLaVA's format, put beside their questions.

    Args:
        questions: by default the labels are read from the answers' own metadata, which only our files have.

    Returns:
        In the questions' order; without questions in the file's.

    Raises:
        UserError: a line is no answer, labels are missing, or a question has no answer or several.
    """
    records = list(_read_lines(path))
    if questions is not None:
        return collect_answers(questions, [record["text"] for record in _joined(records, questions, path)])
    return [_labelled(record, f"{path}: line {number}") for number, record in enumerate(records, 1)]


def _read_lines(path: Path) -> Iterator[dict]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as an answers file ({error}).") from error
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error.msg}). Expected one answer a line.") from error
        if not isinstance(record, dict) or "question_id" not in record or not isinstance(record.get("text"), str):
            raise UserError(f"{path}: line {number} is no answer: expected `question_id` and `text`, got {line:.60}")
        yield record


def _labelled(record: dict, where: str) -> Answer:
    labels = record.get("metadata") or {}
    if lacking := [key for key in ("source", "domain", "metric", "answers") if key not in labels]:
        raise UserError(
            f"{where}: no `{lacking[0]}` in its metadata, so nothing says what is right. Score the file beside its "
            "questions first: mllm score ANSWERS --questions QUESTIONS --out FOLDER."
        )
    return Answer(
        id=str(record["question_id"]),
        source=labels["source"],
        domain=labels["domain"],
        metric=labels["metric"],
        answers=tuple(labels["answers"]),
        question=record.get("prompt", ""),
        prediction=record["text"],
        qtype=labels.get("qtype") or "",
        image=labels.get("image") or "",
        where=where,
        options=tuple(labels.get("options") or ()),
    )


def _joined(records: list[dict], questions: Sequence[Conversation], path: Path) -> Iterator[dict]:
    """The record of each question: of the same id and, where several have it, of its source and its words."""
    of_id: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        of_id[str(record["question_id"])].append(record)
    for question in questions:
        found = of_id[question.id]
        for fits in (_same_source, _same_words):
            found = [record for record in found if fits(record, question)] if len(found) > 1 else found
        if len(found) != 1:
            raise UserError(
                f"{path}: {len(found) or 'no'} answers to {question.where}; expected one. Give the questions that were "
                "asked (and the same --limit), each with an id of its own."
            )
        yield found[0]


def _same_source(record: dict, question: Conversation) -> bool:
    return (record.get("metadata") or {}).get("source", question.source) == question.source


def _same_words(record: dict, question: Conversation) -> bool:
    return collapse(record.get("prompt", "")) == collapse(question.question)
