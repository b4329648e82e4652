"""What a drawn scene offers: a source name, a dense caption, a painter and questions; and the wording they share."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from PIL import Image

from data_recipes.miniworld.conventions import Convention

WORDINGS = {
    "count": ("How many {a} are there?", "How many {a} can you see?", "Count the {a}.", "What is the number of {a}?"),
    "presence": ("Is there {a}?", "Can you see {a}?", "Does the picture show {a}?", "Is there {a} in the picture?"),
    "place": ("Where is the {a}?", "What is the position of the {a}?", "In which place is the {a}?"),
    "what_at": ("What is at the {a}?", "What do you see at the {a}?", "Name the thing at the {a}."),
    "line": ("What stands in line {a}?", "What is in line {a}?", "Name line {a}."),
    "relation": ("What is {b} the {a}?", "What do you see {b} the {a}?", "Name the thing {b} the {a}."),
    "colour": ("What colour is the {a}?", "Which colour does the {a} have?", "Name the colour of the {a}."),
    "value": ("What is the value of {a}?", "What does {a} say?", "Read {a}.", "What stands beside {a}?"),
    "greatest": ("Which is the largest?", "Which has the highest value?", "Where is the value largest?"),
    "least": ("Which is the smallest?", "Which has the lowest value?", "Where is the value smallest?"),
    "larger": ("Which is larger, {a} or {b}?", "Which has the higher value, {a} or {b}?", "Is {a} or {b} larger?"),
    "sum": ("What is {a} plus {b}?", "Add {a} and {b}.", "What do {a} and {b} make together?"),
}


class Question(NamedTuple):
    """One question with its exact answer; ``form`` is the record's qtype."""

    form: str
    text: str
    answer: str
    metric: str = "exact_match"


def ask(rng: Random, form: str, answer: str, metric: str = "exact_match", a: str = "", b: str = "") -> Question:
    """Words a form of question in one of its ways."""
    return Question(form, rng.choice(WORDINGS[form]).format(a=a, b=b), answer, metric)


@dataclass(frozen=True)
class Scene:
    """A drawn scene. ``caption`` states every fact in reading order, in neutral words.

    ``questions`` maps a form of question to a function (rng, convention) -> Question. ``weights`` says how often each
    form is asked, in the same order.
    """

    source: str
    caption: str
    paint: Callable[[Random], Image.Image]
    questions: dict[str, Callable[[Random, Convention], Question]]
    weights: tuple[int, ...]

    def ask(self, rng: Random, convention: Convention) -> Question:
        """One question, its form drawn by weight."""
        (form,) = rng.choices(list(self.questions), self.weights)
        return self.questions[form](rng, convention)

    def ask_several(
        self, rng: Random, convention: Convention, count: int, forms: Container[str] = ()
    ) -> list[Question]:
        """Up to ``count`` questions with different texts; of these forms only, each as likely, if any are given."""
        chosen = [form for form in self.questions if form in forms]
        drawn = (
            self.questions[rng.choice(chosen)](rng, convention) if chosen else self.ask(rng, convention)
            for _ in range(2 * count)
        )
        asked = {question.text: question for question in drawn}
        return list(asked.values())[:count]

    def caption_in_any_order(self, rng: Random) -> str:
        """The caption with its facts shuffled: where a thing is no longer follows from its turn."""
        kind, _, listing = self.caption.partition(": ")
        facts = listing.split(", ")
        rng.shuffle(facts)
        return f"{kind}: {', '.join(facts)}"
