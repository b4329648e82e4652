"""Replies beside what was asked, and the files they are kept in."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mllm.common.errors import UserError
from mllm.data.conversation import Conversation, Turn
from mllm.evaluation.answers import check_gradable, collect_answers, read_answers, read_recipe, write_answers
from mllm.evaluation.recipe import Recipe

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


# -- reading ---------------------------------------------------------------------------------------------------------


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_what_was_written_is_read_back_with_its_labels(tmp_path):
    answers = collect_answers([ROW, with_metric("not_graded")], ["blac", "a line\u2028break\nor two"])
    write_answers(tmp_path / "a.jsonl", answers, model_id="base")
    read = read_answers(tmp_path / "a.jsonl")
    assert [replace(row, where="") for row in read] == [replace(row, where="") for row in answers]


def test_the_recipe_lies_beside_the_answers_and_its_id_in_every_line(tmp_path):
    recipe = Recipe.of([ROW], split="test", template="t", decoding="greedy")
    write_answers(tmp_path / "a.jsonl", collect_answers([ROW], ["black"]), model_id="base", recipe=recipe)
    assert read_recipe(tmp_path / "a.jsonl") == recipe
    assert json.loads((tmp_path / "a.jsonl").read_text())["metadata"]["recipe"] == recipe.id
    assert read_recipe(tmp_path / "other.jsonl") is None


def test_a_failed_write_leaves_the_answers_that_were_there(tmp_path, monkeypatch):
    path = lines(tmp_path / "a.jsonl", {"question_id": "7", "text": "old"})
    monkeypatch.setattr("mllm.evaluation.answers.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_answers(path, collect_answers([ROW], ["new"]), model_id="base")
    assert "old" in path.read_text()


def test_llavas_own_answers_are_put_beside_their_questions_in_the_questions_order(tmp_path):
    questions = [replace(ROW, id=name, answers=(name,)) for name in ("1", "2")]
    path = lines(tmp_path / "a.jsonl", {"question_id": 2, "text": "two"}, {"question_id": 1, "text": "one"})
    read = read_answers(path, questions)
    assert [(row.id, row.prediction, row.answers) for row in read] == [("1", "one", ("1",)), ("2", "two", ("2",))]


def test_rows_of_the_same_id_are_told_apart_by_source_and_by_words(tmp_path):
    other_source, other_words = replace(ROW, source="flickr"), replace(ROW, turns=(Turn("user", "How many?"),))
    path = tmp_path / "a.jsonl"
    write_answers(path, collect_answers([ROW, other_source, other_words], ["a", "b", "c"]), model_id="base")
    read = read_answers(path, [other_words, other_source, ROW])
    assert [row.prediction for row in read] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"question_id": "8", "text": "black"}], "no answers to rows.json: row 3"),
        ([{"question_id": "7", "text": "a"}, {"question_id": "7", "text": "b"}], "no answers to rows.json: row 3"),
        ([{"question_id": "7", "text": "a", "prompt": "Which colour?"}] * 2, "2 answers to rows.json: row 3"),
        ([{"question_id": "7"}], "line 1 is no answer"),
    ],
)
def test_a_question_without_exactly_one_answer_is_named(records, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_answers(lines(tmp_path / "a.jsonl", *records), [ROW])


def test_a_broken_line_is_named(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"question_id": "7", "text": "a"})
    path.write_text(path.read_text() + '{"question_id"\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_answers(path)


def test_answers_without_labels_ask_for_their_questions(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"question_id": "7", "text": "a"})
    with pytest.raises(UserError, match=r"line 1: no `source` in its metadata.*mllm score"):
        read_answers(path)
