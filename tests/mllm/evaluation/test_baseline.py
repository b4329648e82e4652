"""What the blind guesser answers, worked out by hand."""

from mllm.data.conversation import Conversation, Turn
from mllm.evaluation.answers import Answer
from mllm.evaluation.baseline import BlindBaseline


def train_row(*exchanges, source="coco", domain="general", qtype="colour"):
    turns = [turn for question, answer in exchanges for turn in (Turn("user", question), Turn("assistant", answer))]
    return Conversation(id="", turns=tuple(turns), source=source, domain=domain, qtype=qtype)


def asked(question, *, answers=("red",), source="coco", domain="general", qtype="colour", metric="exact_match"):
    return Answer("1", source, domain, metric, tuple(answers), question, prediction="", qtype=qtype)


TRAIN = [
    train_row(("<image>\nWhich colour is the car?", "Red")),
    train_row(("<image>\nwhich  colour is the car?", "red")),
    train_row(("<image>\nWhich colour is the car?", "blue")),
    train_row(("<image>\nWhich colour is the sky?", "blue")),
    train_row(("<image>\nWhich colour is the sea?", "blue")),
    train_row(("<image>\nHow many cars?", "2"), qtype="count"),
    train_row(("<image>\nHow many boats?", "2"), qtype="count"),
    train_row(("<image>\nHow many cats?", "2"), qtype="count"),
    train_row(("<image>\nHow many dogs?", "2"), qtype="count"),
    train_row(("<image>\nWhich colour is the car?", "grey"), source="xray", domain="biomedical"),
]


def test_the_same_question_gets_its_own_commonest_answer_whatever_its_case_and_blanks():
    assert BlindBaseline(TRAIN).answer(asked("Which colour is the CAR?")) == "Red"


def test_an_unseen_question_gets_the_commonest_answer_of_its_qtype():
    assert BlindBaseline(TRAIN).answer(asked("Which colour is the bus?")) == "blue"


def test_an_unseen_qtype_gets_the_commonest_answer_of_the_source():
    assert BlindBaseline(TRAIN).answer(asked("Where is the bus?", qtype="place")) == "2"
    assert BlindBaseline(TRAIN).answer(asked("Where is the bus?", qtype="")) == "2"


def test_the_same_question_in_another_source_has_another_answer():
    assert BlindBaseline(TRAIN).answer(asked("Which colour is the car?", source="xray")) == "grey"


def test_an_unseen_source_gets_the_commonest_answer_of_its_domain_and_then_of_all():
    assert BlindBaseline(TRAIN).answer(asked("What?", source="mri", domain="biomedical")) == "grey"
    assert BlindBaseline(TRAIN).answer(asked("What?", source="doc", domain="document")) == "2"


def test_every_turn_of_a_training_conversation_counts():
    rows = [train_row(("<image>\nHow many cars?", "1"), ("And boats?", "3")), train_row(("And boats?", "3"))]
    assert BlindBaseline(rows).answer(asked("And boats?")) == "3"


def test_a_tie_goes_to_the_answer_met_first():
    rows = [train_row(("Left or right?", "right")), train_row(("Left or right?", "left"))]
    assert BlindBaseline(rows).answer(asked("Left or right?")) == "right"


def test_the_guess_is_graded_by_the_rows_own_metric():
    blind = BlindBaseline([train_row(("What is the total?", "100"))])
    assert blind.score(asked("What is the total?", answers=["104"], metric="relaxed_accuracy")) == 1.0
    assert blind.score(asked("What is the total?", answers=["104"], metric="exact_match")) == 0.0


def test_without_training_rows_there_is_no_guess():
    assert BlindBaseline([]).score(asked("What?")) is None
