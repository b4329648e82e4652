"""Replies beside what was asked, and the files they are kept in."""

import json
from pathlib import Path

import pytest

from mllm.data.conversation import Conversation, Turn
from mllm.errors import UserError
from mllm.evaluation.answers import check_gradable, collect_answers, write_answers

ROW = Conversation(
    id="7",
    turns=(
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", "a cat"),
        Turn("user", "Which colour?"),
        Turn("assistant", "black"),
    ),
    images=(Path("cat.png"),),
    source="coco",
    domain="general",
    metric="anls",
    answers=("black", "dark"),
    qtype="colour",
    where="rows.json: row 3 (id 7)",
)


def with_metric(metric, answers=("black",)):
    return Conversation(id="7", turns=ROW.turns, metric=metric, answers=answers, where="rows.json: row 3")


def test_the_last_question_and_all_labels_are_taken_over():
    (answer,) = collect_answers([ROW], ["blac"])
    assert (answer.question, answer.qtype, answer.image) == ("Which colour?", "colour", "cat.png")
    assert answer.grade() == pytest.approx(1 - 1 / 5)


def test_a_row_without_metric_is_graded_by_exact_match():
    (answer,) = collect_answers([with_metric(None)], ["Black."])
    assert answer.grade() == 1.0


def test_fewer_replies_than_questions_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        collect_answers([ROW, ROW], ["one"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (with_metric("anlss"), "rows.json: row 3: no metric 'anlss'.*Did you mean 'anls'"),
        (with_metric("vqa_accuracy"), "rows.json: row 3: .*ten people"),
    ],
)
def test_a_row_that_cannot_be_graded_is_found_before_anything_is_asked(row, message):
    with pytest.raises(UserError, match=message):
        check_gradable([ROW, row])


def test_captions_pass_the_check_though_they_are_not_graded():
    assert check_gradable([ROW, with_metric("not_graded")]) is None  # it raises on what it refuses


def test_the_answers_file_has_the_keys_of_llavas(tmp_path):
    path = tmp_path / "base.jsonl"
    write_answers(
        path, collect_answers([ROW, with_metric("not_graded")], ["black", "ein Kätzchen\nim Gras"]), model_id="base"
    )
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert set(first) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert (first["question_id"], first["prompt"], first["text"], first["model_id"]) == (
        "7",
        "Which colour?",
        "black",
        "base",
    )
    assert first["metadata"]["score"] == 1.0
    assert second["text"] == "ein Kätzchen\nim Gras"
    assert second["metadata"]["score"] is None
    assert first["answer_id"] != second["answer_id"]
