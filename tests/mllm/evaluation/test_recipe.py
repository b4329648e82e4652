"""What a score is a score of, in one id."""

from dataclasses import replace
from pathlib import Path

import pytest

from mllm.common.digests import digest
from mllm.data.conversation import Conversation, Turn
from mllm.evaluation.answers import collect_answers
from mllm.evaluation.metrics import METRICS, SCORER_VERSION
from mllm.evaluation.recipe import Recipe, describe

ROW = Conversation(
    id="7",
    turns=(Turn("user", "<image>\nWhich colour?"), Turn("assistant", "black")),
    images=(Path("a/cat.png"),),
    source="coco",
    metric="anls",
    answers=("black",),
)


def recipe(row=ROW, template="{{ messages }}", decoding="greedy"):
    return Recipe.of([row], split="test", template=template, decoding=decoding)


def with_question(text):
    return replace(ROW, turns=(Turn("user", text), ROW.turns[1]))


CHANGES = {
    "question": recipe(with_question("<image>\nWhat colour?")),
    "place of the picture": recipe(with_question("Which colour?\n<image>")),
    "picture": recipe(replace(ROW, images=(Path("a/dog.png"),))),
    "template": recipe(template="{{ other }}"),
    "decoding": recipe(decoding="sampled"),
    "blanked": recipe().blanked(),
}
LABELS = {
    "accepted answers": recipe(replace(ROW, answers=("black", "dark"))),
    "metric": recipe(replace(ROW, metric="exact_match")),
    "split": replace(recipe(), split="val"),
    "scorer": replace(recipe(), scorer="0"),
}


@pytest.mark.parametrize("change", CHANGES | LABELS)
def test_whatever_moves_a_score_changes_the_id(change):
    assert (CHANGES | LABELS)[change].id != recipe().id


@pytest.mark.parametrize("change", CHANGES)
def test_what_moves_a_reply_asks_for_new_replies(change):
    assert CHANGES[change].asked != recipe().asked


@pytest.mark.parametrize("change", LABELS)
def test_what_moves_only_the_grade_does_not(change):
    assert LABELS[change].asked == recipe().asked


def test_the_id_is_the_same_in_every_process_and_folder():
    assert recipe().id == recipe(replace(ROW, images=(Path("elsewhere/cat.png"),), where="other.json: row 1")).id
    assert digest(["a", 1]) == "2657442bb4"


def test_the_answer_in_the_row_is_no_part_of_the_prompt():
    unanswered = replace(ROW, turns=ROW.turns[:1])
    assert recipe(unanswered).prompt == recipe().prompt


def test_it_is_read_back_as_it_was_written():
    assert Recipe.from_json(recipe().to_json()) == recipe()


def test_answers_to_the_same_rows_keep_the_recipe_they_were_asked_by_and_get_todays_scorer():
    answers = collect_answers([ROW], ["black"])
    assert Recipe.of_answers(answers, split="x", known=replace(recipe(), scorer="0")) == recipe()


def test_of_answers_to_other_rows_only_template_and_decoding_are_known():
    answers = collect_answers([replace(ROW, id="8")], ["black"])
    found = Recipe.of_answers(answers, split="x", known=recipe())
    assert (found.template, found.decoding, found.prompt) == (recipe().template, "greedy", None)


def test_a_line_tells_all_of_it():
    line = describe(recipe().to_json())
    for part in ("1 questions of test (coco", recipe().rows, recipe().prompt, recipe().template, "greedy", "seen"):
        assert part in line
    assert "prompt unknown" in describe(Recipe.of_answers(collect_answers([ROW], ["x"]), split="x").to_json())


REPLIES = ["Yes, there is.", "12.5", "13", "5%", "The two  cats.", "isnt", "A", "", "a receipt; total 12.50"]
TRUTHS = [("yes",), ("12.50",), ("0.05",), ("cats",), ("2 cats",), ("isn't",) * 10, ("A",)]


def test_a_change_of_the_graders_raises_the_scorer_version():
    """When this fails because a metric was changed, raise SCORER_VERSION and put the new pair here."""
    graded = [
        [name, reply, truth, round(metric(reply, truth), 9)]
        for name, metric in sorted(METRICS.items())
        for reply in REPLIES
        for truth in TRUTHS
        if name != "vqa_accuracy" or len(truth) == 10
    ]
    assert (SCORER_VERSION, digest(graded)) == ("1", "62e766bdef")
