"""Figures that only a set has, worked by hand."""

import pytest

from mllm.evaluation.answers import Answer
from mllm.evaluation.figures import figures_of


def row(metric, prediction, *answers, name="0", **more):
    return Answer(
        id=name,
        source="s",
        domain="general",
        metric=metric,
        answers=answers,
        question="q",
        prediction=prediction,
        **more,
    )


def values(*rows):
    return {key: figure["value"] for key, figure in figures_of(rows)["s"].items()}


def test_pope_counts_a_reply_without_yes_or_no_as_a_yes_and_strictly_as_neither():
    found = values(
        row("pope", "Yes", "yes", qtype="random"),
        row("pope", "maybe", "no", qtype="random"),
        row("pope", "No", "yes", qtype="popular"),
        row("pope", "No", "no", qtype="popular"),
    )
    assert found["all: precision"] == found["all: recall"] == found["all: F1"] == found["all: yes ratio"] == 0.5
    assert found["all: precision (strict)"] == 1.0
    assert found["all: yes ratio (strict)"] == 0.25
    assert found["random: recall"] == 1.0
    assert found["popular: F1"] == 0.0
    assert found["random"] == 0.5  # the mean of that kind


def test_mme_sums_acc_and_acc_plus_of_pictures():
    found = values(
        row("mme", "Yes", "yes", image="a", qtype="count"),
        row("mme", "No", "no", image="a", qtype="count"),
        row("mme", "Yes", "yes", image="b", qtype="count"),
        row("mme", "Yes", "no", image="b", qtype="count"),
        row("mme", "Yes", "no", image="c", qtype="code_reasoning"),
    )
    assert found["count: acc"] == 0.75
    assert found["count: acc+"] == 0.5
    assert found["perception (1 of 10 subtasks)"] == 125.0
    assert found["cognition (1 of 4 subtasks)"] == 0.0


def test_circular_questions_are_right_in_all_rotations_or_not():
    rows = [
        row("option_letter_circular", reply, "A", name=name, options=("x", "y"))
        for name, reply in (("7", "A"), ("1000007", "A"), ("8", "A"), ("1000008", "B"))
    ]
    assert values(*rows) == {"right in all rotations": 0.5}


def test_fields_that_a_form_does_not_give_count_neither_as_said_nor_as_true():
    found = values(
        row("field_f1", "5", "5"),
        row("field_f1", "None", "7"),
        row("field_f1", "None", "None"),
        row("field_f1", "9", "8"),
    )
    assert found["fields: precision"] == 0.5
    assert found["fields: recall"] == pytest.approx(1 / 3)


def test_llava_meds_closed_mean_leaves_out_what_its_script_does():
    found = values(
        row("closed_accuracy", "yes", "yes"),
        row("closed_accuracy", "no", "yes"),
        row("closed_accuracy", "left", "right"),
    )
    assert found == {"closed by LLaVA-Med's script (2 of 3 rows)": 0.5}


def test_captions_have_cider_and_bleu_beside_the_mean():
    found = values(row("rouge_l", "a cat sits", "a cat sits"), row("rouge_l", "a dog", "two birds fly"))
    assert found.keys() == {"CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"}
    assert found["ROUGE-L"] == 0.5


def test_kinds_of_questions_have_their_means_and_rows_without_a_set_none():
    rows = [row("exact_match", "x", "x", qtype="easy"), row("exact_match", "y", "x", qtype="hard")]
    assert values(*rows) == {"easy": 1.0, "hard": 0.0}
    assert figures_of([row("exact_match", "x", "x")]) == {}
