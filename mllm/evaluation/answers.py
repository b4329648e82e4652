"""One graded reply, and the files replies are kept in."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm.data.conversation import Conversation
from mllm.errors import UserError
from mllm.evaluation.metrics import NOT_GRADED, score

DEFAULT_METRIC = "exact_match"


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

    def grade(self) -> float:
        """The grade in [0, 1] by the row's own metric. Raises UserError, naming the row, if it cannot be graded."""
        try:
            return score(self.metric, self.prediction, self.answers)
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


def write_answers(path: Path, answers: Iterable[Answer], *, model_id: str) -> None:
    """One JSON object a line with the keys of LLaVA's answer files, so that its scripts and viewers read them."""
    lines = [json.dumps(_llava_record(answer, model_id), ensure_ascii=False) for answer in answers]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _llava_record(answer: Answer, model_id: str) -> dict:
    key = f"{model_id}/{answer.source}/{answer.id}/{answer.question}"
    return {
        "question_id": answer.id,
        "prompt": answer.question,
        "text": answer.prediction,
        "answer_id": hashlib.sha256(key.encode()).hexdigest()[:22],  # the same run gives the same file
        "model_id": model_id,
        "metadata": {
            "source": answer.source,
            "domain": answer.domain,
            "qtype": answer.qtype,
            "metric": answer.metric,
            "answers": list(answer.answers),
            "score": answer.grade() if answer.graded else None,
        },
    }
