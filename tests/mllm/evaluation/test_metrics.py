"""Hand-worked cases of every metric, the places where published scorers slip among them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.common.errors import UserError
from mllm.evaluation.metrics import METRICS, score


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Smooth", "smooth"),
        ("  red \n", "red"),
        ("On the right shoulder", "On the right shoulder."),
        ("the left kidney", "left kidney"),
        ("left of a box", "left of the box"),
        ("one", "1"),
        ("Two dogs.", "2 dogs"),
        ("twenty-one", "21"),
        ("A.", "A"),
        ("3.4 cm", "3.4 cm."),
        ("arla   standard milk", "Arla Standard Milk"),
    ],
)
def test_exact_match_forgives_case_blanks_final_period_articles_and_number_words(prediction, answer):
    assert score("exact_match", prediction, [answer]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("", "A"),  # an option letter is not an article
        ("the", "A"),
        ("hepatitis", "hepatitis A"),
        ("A. cell phone", "A"),
        ("dogs", "dog"),
        ("34 cm", "3.4 cm"),
        ("", "red"),
        ("red or blue", "red"),
        ("0", "none"),  # a number word only to VQA's normaliser
    ],
)
def test_exact_match_forgives_nothing_else(prediction, answer):
    assert score("exact_match", prediction, [answer]) == 0.0


def test_exact_match_accepts_any_of_the_answers():
    assert score("exact_match", "vial", ["bottle", "vial"]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("yes", "Yes", 1.0),
        ("Yes, there is one.", "yes", 1.0),
        ("**No**", "no", 1.0),
        ("No.", "no", 1.0),
        ("TRUE", "true", 1.0),
        ("not sure", "no", 0.0),
        ("nothing is there", "no", 0.0),
        ("There is no cat, yes", "no", 0.0),  # only the first word counts
        ("yes", "true", 0.0),
        ("", "no", 0.0),  # POPE's script would call an empty reply a yes
        ("", "yes", 0.0),
        ("...", "no", 0.0),
    ],
)
def test_yes_no_accuracy_compares_first_words(prediction, answer, expected):
    assert score("yes_no_accuracy", prediction, [answer]) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("1940012", ["1940012"], 1.0),
        (" 03/03/20 ", ["03/03/20"], 1.0),
        ("Amendment", ["amendment"], 1.0),
        ("hallo", ["hello"], 1 - 1 / 5),
        ("abcd", ["abxy"], 0.0),  # NL is exactly one half, and the half is out
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("", ["abc"], 0.0),
        ("kitten", ["dog", "sitten", "sitting"], 1 - 1 / 6),
        ("a  bcd", ["a bcd"], 1 - 1 / 6),  # an inner blank is a letter like others, above and below the fraction line
    ],
)
def test_anls_is_the_best_similarity_cut_off_below_one_half(prediction, answers, expected):
    assert score("anls", prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("105", "100", 1.0),
        ("95", "100", 1.0),
        ("1.05", "1", 1.0),
        ("105.1", "100", 0.0),
        ("-105", "-100", 1.0),
        ("5", "-5", 0.0),
        ("302.38%", "3.0238", 1.0),
        ("5 %", "0.05", 1.0),
        ("5", "5%", 0.0),
        ("5", "0.05", 0.0),
        ("0", "0", 1.0),
        ("0.01", "0", 0.0),
        ("Chile", "chile", 1.0),
        ("Chili", "Chile", 0.0),
        ("1 chart", "1", 0.0),
        ("nan", "nan", 1.0),  # a word
        ("inf", "3", 0.0),
        ("", "3", 0.0),
        ("%", "%", 1.0),
    ],
)
def test_relaxed_accuracy_gives_numbers_five_percent_and_words_none(prediction, answer, expected):
    assert score("relaxed_accuracy", prediction, [answer]) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # k of ten agree: each of them sees k - 1 others, each of the rest sees k
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_averages_over_each_person_left_out(agreeing, expected):
    answers = ["cat"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert score("vqa_accuracy", "cat", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("The cat.", "cat"),
        ("none", "0"),
        ("ten", "10"),
        ("1,000", "1000"),
        ("dont know", "don't know"),
        ("wouldnt've", "wouldn't've"),
        ("red/blue", "red blue"),
        ("3.5", "3.5"),
        ("red/blue, green", "red blue green"),
        ("what?", "what"),
    ],
)
def test_vqa_accuracy_compares_after_the_published_normaliser(prediction, answer):
    assert score("vqa_accuracy", prediction, [answer] * 10) == 1.0


def test_vqa_accuracy_drops_a_mark_everywhere_once_it_touches_a_blank():
    assert score("vqa_accuracy", "x-ray - chest", ["xray chest"] * 10) == 1.0
    assert score("vqa_accuracy", "x-ray", ["xray"] * 10) == 0.0


def test_vqa_accuracy_does_not_know_numbers_beyond_ten():
    assert score("vqa_accuracy", "eleven", ["11"] * 10) == 0.0


def test_vqa_accuracy_refuses_a_row_without_ten_answers():
    with pytest.raises(UserError, match="ten people, but this row has 1"):
        score("vqa_accuracy", "cat", ["cat"])


def test_a_caption_is_refused_as_not_graded():
    with pytest.raises(UserError, match="'not_graded' is for training only"):
        score("not_graded", "a dog", ["a dog"])


def test_an_unknown_metric_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="Did you mean 'exact_match'"):
        score("exactmatch", "a", ["a"])


def test_a_row_without_answers_is_refused():
    with pytest.raises(UserError, match="at least one accepted answer"):
        score("anls", "a", [])


@settings(deadline=None)  # a busy machine is not a wrong metric
@given(prediction=st.text(max_size=30), answers=st.lists(st.text(max_size=30), min_size=10, max_size=10))
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_stays_between_0_and_1_on_any_text(metric, prediction, answers):
    assert 0.0 <= score(metric, prediction, answers) <= 1.0


@settings(deadline=None)  # a busy machine is not a wrong metric
@given(answer=st.from_regex(r"[A-Za-z0-9]{1,8}( [A-Za-z0-9]{1,8}){0,2}", fullmatch=True))
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_gives_the_answer_itself_full_marks(metric, answer):
    assert score(metric, answer, [answer] * 10) == 1.0
