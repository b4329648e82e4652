"""Hand-worked cases of the scorers that issue from published rules: ours, and the exact forms beside them.

A line is (reply, answer, grade); of option letters the options are the four below, of VQA the answer is what ten people
said. Where ours and an exact form part, the same reply stands in both tables.
"""

import pytest

from mllm.common.errors import UserError
from mllm.evaluation.metrics import ALL_METRICS, EXACT_FORMS, OF_OPTIONS, score

OPTIONS = ("cat", "black cat", "dog", "left of the box")

LETTERS = {
    "option_letter": [
        ("A", "A", 1), ("B", "A", 0), ("b", "B", 1), (" C ", "C", 1), ("C.", "C", 1), ("(D)", "D", 1), ("(d)", "D", 1),
        ("[B]", "B", 1), ("**B**", "B", 1), ("B\n", "B", 1), ("B. black cat", "B", 1), ("B: black cat", "B", 1),
        ("B) black cat", "B", 1), ("(B) black cat", "B", 1), ("The answer is B", "B", 1), ("The answer is B.", "B", 1),
        ("The answer is (B).", "B", 1), ("the correct answer is: C", "C", 1), ("Answer: D", "D", 1),
        ("Option C", "C", 1), ("option (C) is right", "C", 1), ("dog", "C", 1), ("Dog.", "C", 1), ("a dog", "C", 1),
        ("It is a dog.", "C", 1), ("black cat", "B", 1), ("the black cat", "B", 1), ("cat", "A", 1),
        ("left of the box", "D", 1), ("It is left of the box", "D", 1), ("category", "A", 0), ("dogma", "C", 0),
        ("a cat and a dog", "A", 0), ("a cat and a dog", "C", 0), ("", "A", 0), ("?", "A", 0), ("E", "A", 0),
        ("Z", "A", 0), ("A cat", "A", 1), ("A dog", "A", 0), ("A dog", "C", 1), ("I see a dog", "C", 1),
        ("A or B", "A", 0), ("A or B", "B", 0), ("The answer is A dog", "C", 1), ("not sure", "A", 0),
        ("The answer is B because C is wrong", "B", 0), ("The answer is B, since C is wrong", "B", 1),
    ],
    "option_letter_llava": [
        ("A", "A", 1), ("B", "A", 0), ("b", "B", 0), (" C ", "C", 0), ("C.", "C", 0), ("(D)", "D", 0), ("B\n", "B", 0),
        ("B. black cat", "B", 1), ("B: black cat", "B", 0), ("B) black cat", "B", 0), ("The answer is B", "B", 0),
        ("The answer is B.", "B", 1), ("The answer is B!", "B", 1), ("so The answer is C. Yes", "C", 1),
        ("The answer is B. The answer is C.", "B", 0), ("The answer is B. The answer is C.", "C", 0),
        ("the answer is B.", "B", 0), ("dog", "C", 0), ("E", "A", 0), ("E. x", "A", 0), ("", "A", 0), ("A. ", "A", 1),
        ("The answer is Z.", "A", 0),
    ],
    "option_letter_mmbench": [
        ("A", "A", 1), ("B", "A", 0), ("b", "B", 0), ("C.", "C", 1), ("(D)", "D", 1), ("B: black cat", "B", 1),
        ("The answer is B", "B", 1), ("B is the one that I would choose here", "B", 0),
        ("I would choose B here", "B", 1),
        ("dog", "C", 1), ("A dog", "A", 1), ("A dog", "C", 0), ("It is a dog", "C", 1), ("category", "A", 1),
        ("dogma", "C", 1), ("black cat", "B", 0), ("black cat", "A", 0), ("A or B", "A", 0),
        ("A or B, so a dog", "C", 1),
        ("Z", "A", 0), ("Cannot determine the answer: dog", "C", 0), ("", "A", 0), ("{C}", "C", 1), ("*B*", "B", 1),
        ("dog " * 20, "C", 0), ("I can't process this file. A", "A", 0),
    ],
    "option_letter_mmmu": [
        ("A", "A", 1), ("B", "A", 0), ("b", "B", 0.25), ("C.", "C", 1), ("(D)", "D", 1), ("(D)", "A", 0),
        ("A or (B)", "B", 1), ("(A) or (B)", "B", 1), ("(A) or (B)", "A", 0), ("A or B", "B", 1), ("A dog", "A", 1),
        ("The answer is B", "B", 1), ("The answer is B.", "B", 1), ("B: black cat", "B", 0.25), ("dog", "C", 0.25),
        ("in this picture I see a dog", "C", 1), ("in this picture I see a category", "A", 1),
        ("in this picture I see a black cat", "B", 0), ("in this picture I see a black cat", "A", 1),
        ("a dog or else it is a cat", "A", 1), ("", "A", 0.25),
        ("?", "D", 0.25), ("'C'", "C", 1), ("B because A is wrong", "A", 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "reply", "letter", "grade"), [(metric, *case) for metric, cases in LETTERS.items() for case in cases]
)
def test_option_letters(metric, reply, letter, grade):
    assert score(metric, reply, [letter], OPTIONS) == grade


@pytest.mark.parametrize("metric", OF_OPTIONS)
def test_option_letters_need_options_and_an_answer_among_them(metric):
    with pytest.raises(UserError, match="needs the row's `options`"):
        score(metric, "A", ["A"])
    with pytest.raises(UserError, match="an option's letter"):
        score(metric, "A", ["cat"], OPTIONS)
    with pytest.raises(UserError, match=r"\(A to D\)"):
        score(metric, "A", ["E"], OPTIONS)


def test_equal_options_are_not_told_apart_by_their_text():
    assert score("option_letter", "same", ["A"], ["same", "same"]) == 0.0
    assert score("option_letter", "B", ["B"], ["same", "same"]) == 1.0


TEXTS = {
    "yes_no_accuracy": [
        ("Yes", "yes", 1), ("Yes.", "yes", 1), ("yes, there is", "yes", 1), ("No, it is not", "no", 1),
        ("There is no dog", "no", 0), ("Not at all", "no", 0), ("", "yes", 0), ("maybe", "yes", 0), ("NO", "no", 1),
    ],
    "pope": [
        ("Yes", "yes", 1), ("Yes.", "yes", 1), ("yes, there is", "yes", 1), ("No", "no", 1), ("no", "no", 1),
        ("No, it is not", "no", 1), ("There is no dog", "no", 1), ("It is not there", "no", 1), ("NO", "no", 0),
        ("Not at all", "no", 0), ("", "yes", 1), ("", "no", 0), ("maybe", "yes", 1), ("I know", "yes", 1),
        ("Yes. There is no cat", "yes", 1), ("Hm. No", "no", 0), ("No,", "no", 1), ("no!", "no", 0),
    ],
    "pope_lmms_eval": [
        ("Yes", "yes", 1), (" yes\n", "yes", 1), ("Yes.", "yes", 0), ("No, it is not", "no", 0), ("NO", "no", 1),
        ("", "no", 0),
    ],
    "mme": [
        ("Yes", "Yes", 1), ("yes.", "Yes", 1), ("Y", "Yes", 1), ("n", "No", 1), ("x", "No", 0), ("No, it is", "No", 1),
        ("Not sure", "No", 1), ("None", "No", 1), ("Know", "No", 1), ("I know", "No", 0), ("A yes", "Yes", 0),
        ("Is no", "No", 0), ("", "Yes", 0), ("The answer is yes", "Yes", 0), (" No ", "No", 1), ("o no", "No", 1),
    ],
    "anls": [
        ("ab", "ac", 0), ("abc", "abd", 2 / 3), ("abc", "abc", 1), (" ABC ", "abc", 1), ("", "a", 0),
        ("a  b", "a b", 0.75), ("abcd", "ab", 0), ("abcde", "abc", 0.6),
    ],
    "anls_official": [
        ("ab", "ac", 0.5), ("abc", "abd", 2 / 3), ("abc", "abc", 1), (" ABC ", "abc", 1), ("", "a", 0),
        ("a  b", "a b", 1), ("abcd", "ab", 0.5), ("abc", "xyz", 0), ("ab     ", "ac", 6 / 7), ("", "", 1),
    ],
    "relaxed_accuracy": [
        ("10", "10.5", 1), ("10", "10.6", 0), ("5%", "0.05", 1), ("5", "5%", 0), (" Red ", "red", 1), ("0", "0", 1),
        ("0.01", "0", 0), ("1.05", "1", 1), ("nan", "nan", 1), ("0.0", "0", 0), ("-10", "10", 0), ("-10", "-10.2", 1),
        ("1e2", "100", 1),
    ],
    "relaxed_accuracy_official": [
        ("10", "10.5", 1), ("10", "10.6", 0), ("5%", "0.05", 1), ("5", "5%", 0), (" Red ", "red", 0), ("red", "Red", 1),
        ("0", "0", 1), ("0.01", "0", 0), ("1.05", "1", 0), ("nan", "nan", 0), ("5%%", "0.05", 1), ("5% ", "0.05", 0),
        (" 10 ", "10", 1), ("inf", "10", 0),
    ],
    "exact_match": [
        ("t-shirt", "t-shirt", 1), ("t shirt", "t-shirt", 0), ("Red.", "red", 1), (" red ", "red", 1),
        ("red!", "red", 0),
        ("a dog", "dog", 1), ("two", "2", 1),
    ],
    "gqa_llava": [
        ("Red", "red", 1), ("Red.", "red", 1), ("red...", "red", 1), (" red", "red", 0), ("red ", "red", 0),
        ("red!", "red", 0), ("a dog", "dog", 0), ("two", "2", 0), ("t-shirt", "t-shirt", 1), ("t shirt", "t-shirt", 0),
    ],
    "gqa_lmms_eval": [
        ("Red", "red", 1), ("Red.", "red", 1), ("red!", "red", 1), (" red", "red", 0), ("tshirt", "t-shirt", 1),
        ("t shirt", "t-shirt", 0), ("a dog", "dog", 0), ("(red)", "red", 1), ("it's", "its", 1),
    ],
    "mmmu_open": [
        ("3.14", "3.14", 1), ("The result is 3.141", "3.14", 1), ("x = 3.14", "3.14", 1), ("1,000", "1000", 1),
        ("The answer is a blue cat", "blue cat", 1), ("I know", "no", 0), ("The answer is no", "no", 1),
        ("cat", "dog", 0),
        ("The answer is cat. Dogs bark", "cat", 1), ("It is 5. So the answer is 7", "7", 1), ("", "cat", 0),
        ("category", "cat", 0), ("1e3", "1000", 1), ("3.15", "3.14", 0),
    ],
    "mmmu_open_official": [
        ("3.14", "3.14", 1), ("The result is 3.141", "3.14", 1), ("x = 3.14", "3.14", 1), ("1,000", "1000", 1),
        ("The answer is a blue cat", "blue cat", 1), ("I know", "no", 1), ("The answer is no", "no", 1),
        ("cat", "dog", 0), ("category", "cat", 1), ("", "cat", 0), ("1e3", "1000", 1), ("3.15", "3.14", 0),
        ("the answer is\ndog", "dog", 0), ("the final answer is dog", "cat", 0),
    ],
    "open_recall": [
        ("left upper lobe", "left upper lobe", 1), ("the left lobe", "left upper lobe", 2 / 3), ("lung", "heart", 0),
        ("Left, upper lobe.", "left upper lobe", 1), ("left left left", "left upper lobe", 1 / 3), ("", "lung", 0),
        ("it is in the left upper lobe of the lung", "left upper lobe", 1), ("two", "2", 1), ("the", "the", 1),
    ],
    "open_recall_llava_med": [
        ("left upper lobe", "left upper lobe", 1), ("the left lobe", "left upper lobe", 2 / 3), ("lung", "heart", 0),
        ("left left left", "left upper lobe", 3 / 5), ("", "lung", 0), ("the", "the", 0), ("two", "2", 1),
        ("left left left left", "left upper lobe", 2 / 3),
    ],
    "token_f1": [
        ("left upper lobe", "left upper lobe", 1), ("left lobe", "left upper lobe", 0.8), ("lung", "heart", 0),
        ("left left left", "left upper lobe", 1 / 3), ("", "lung", 0), ("the lung", "lung", 1),
        ("a b c d lung", "lung", 2 / 5),
    ],
    "token_f1_llava_med": [
        ("left upper lobe", "left upper lobe", 1), ("left lobe", "left upper lobe", 0.8), ("lung", "heart", 0),
        ("left left left", "left upper lobe", 0.75), ("", "lung", 0), ("the lung", "lung", 1),
    ],
    "exact_match_llava_med": [
        ("left upper lobe", "left upper lobe", 1), ("left", "left upper lobe", 1),
        ("left lung", "left upper lobe", 0.5),
        ("", "lung", 0), ("left left", "left upper lobe", 0.5),
    ],
    "closed_accuracy": [
        ("Yes", "yes", 1), ("yes, it is", "Yes", 1), ("No.", "no", 1), ("it is unknown", "no", 0), ("left", "left", 1),
        ("on the left side", "left", 1), ("right", "left", 0), ("There is no mass", "no", 1), ("", "no", 0),
        ("yes and no", "yes", 1), ("yes and no", "no", 0), ("x-ray", "x-ray", 1), ("cleft", "left", 0),
    ],
    "closed_accuracy_llava_med": [
        ("Yes", "yes", 1), ("yes, it is", "yes", 1), ("No.", "no", 1), ("it is unknown", "no", 1), ("left", "left", 0),
        ("no, left", "left", 1), ("right", "left", 0), ("There is no mass", "no", 1), ("", "no", 0),
        ("yes and no", "no", 1), ("no", "yes", 0),
    ],
    "field_f1": [
        ("$1,200.00", "$1,200.00", 1), ("1200", "$1,200.00", 0), ("None", "None", 1), ("", "none", 1),
        ("N/A.", "none", 1),
        ("ABC Corp.", "abc corp", 1), ("None", "abc", 0),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "reply", "answer", "grade"), [(metric, *case) for metric, cases in TEXTS.items() for case in cases]
)
def test_texts(metric, reply, answer, grade):
    answer = answer.lower() if metric == "mme" else answer
    assert score(metric, reply, [answer]) == pytest.approx(grade)


PEOPLE = {
    "vqa_accuracy": [
        ("a dog", ["a dog"] * 10, 1), ("dog", ["a dog"] * 10, 1), ("Yes", ["yes"] * 10, 1), ("two", ["two"] * 10, 1),
        ("yes", ["yes"] * 3 + ["no"] * 7, 0.9), ("yes", ["yes"] * 2 + ["no"] * 8, 0.6),
        ("yes", ["yes"] + ["no"] * 9, 0.3),
        ("dog's", ["dog s"] * 10, 0), ("dog's", ["dog 's"] * 10, 1),
    ],
    "vqa_accuracy_official": [
        ("a dog", ["a dog"] * 10, 0), ("dog", ["a dog"] * 10, 0), ("dog", ["dog"] * 10, 1), ("two", ["two"] * 10, 0),
        ("two", ["2"] * 10, 1), ("Yes", ["yes"] * 10, 1), ("Yes", ["Yes"] * 10, 0), ("Yes", ["yes"] * 9 + ["no"], 1),
        ("yes", ["yes"] * 3 + ["no"] * 7, 0.9), ("t shirt", ["t-shirt"] * 9 + ["shirt"], 1),
        ("t-shirt", ["t-shirt"] * 10, 0),
    ],
    "vqa_accuracy_lmms_eval": [
        ("a dog", ["a dog"] * 10, 1), ("two", ["two"] * 10, 1), ("Yes", ["yes"] * 10, 1), ("dog's", ["dog 's"] * 10, 0),
        ("yes", ["yes"] * 2 + ["no"] * 8, 0.6), ("1,000 - 2", ["1000 2"] * 10, 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "reply", "answers", "grade"), [(metric, *case) for metric, cases in PEOPLE.items() for case in cases]
)
def test_ten_people(metric, reply, answers, grade):
    assert score(metric, reply, answers) == pytest.approx(grade)


def test_every_scorer_has_cases_and_there_are_300():
    counted = sum(map(len, [*LETTERS.values(), *TEXTS.values(), *PEOPLE.values()]))
    assert counted >= 300
    elsewhere = {"option_letter_circular", "rouge_l"}  # that of option_letter; test_captions.py
    assert LETTERS.keys() | TEXTS.keys() | PEOPLE.keys() | elsewhere == ALL_METRICS.keys()


@pytest.mark.parametrize("metric", EXACT_FORMS.keys() | OF_OPTIONS.keys())
def test_docstrings_say_which_form_it_is(metric):
    words = ALL_METRICS[metric].__doc__.lower()
    assert "exact form" in words or "corrected form" in words or "`option_letter`" in words
