"""The blind baseline: what one scores by knowing the training answers and never looking at a picture."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from mllm.data.conversation import IMAGE_PLACE, Conversation
from mllm.evaluation.answers import Answer
from mllm.evaluation.metrics import collapse, score


class BlindBaseline:
    """Answers every question by the commonest training answer: to this very question in its source, else in its domain,
    else anywhere; else to its qtype in the source, else in the source, the domain, at all. Ties go to the answer met
    first.
    """

    def __init__(self, train_rows: Iterable[Conversation]) -> None:
        counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        self._spelling: dict[str, str] = {}
        for row in train_rows:
            for question, answer in _exchanges(row):
                self._spelling.setdefault(collapse(answer), answer)
                for key in _keys(row.source, row.domain, row.qtype or "", question):
                    counts[key][collapse(answer)] += 1
        self._commonest = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}

    def answer(self, row: Answer) -> str | None:
        """The guess for a question, None where there was no training row at all."""
        keys = _keys(row.source, row.domain, row.qtype, row.question)
        guess = next((self._commonest[key] for key in keys if key in self._commonest), None)
        return None if guess is None else self._spelling[guess]

    def score(self, row: Answer) -> float | None:
        """The guess graded by the row's own metric."""
        guess = self.answer(row)
        return None if guess is None else score(row.metric, guess, row.answers, row.options)


def _exchanges(row: Conversation) -> Iterator[tuple[str, str]]:
    """(question, answer) of each turn pair."""
    questions = (turn.text for turn in row.turns if turn.role == "user")
    answers = (turn.text for turn in row.turns if turn.role == "assistant")
    yield from zip(questions, answers, strict=False)


def _keys(source: str, domain: str, qtype: str, question: str) -> list[tuple[str, ...]]:
    """From the narrowest group of training rows to the widest."""
    by_qtype = [("qtype", source, qtype)] if qtype else []
    text = collapse(question.replace(IMAGE_PLACE, ""))
    asked_anywhere = [
        ("question of domain", domain, text),
        ("question", text),
    ]  # sources may be named otherwise in training
    return [("question", source, text), *asked_anywhere, *by_qtype, ("source", source), ("domain", domain), ("all",)]
