"""Two models on the same questions, domain by domain."""

import json

import pytest

from mllm.common.errors import UserError
from mllm.data.conversation import Conversation, Turn
from mllm.evaluation.answers import Answer
from mllm.evaluation.compare import compare_answers, comparison_notes, comparison_tables, write_comparison
from mllm.evaluation.recipe import Recipe

SIZES = {"general": 40, "document": 20}


def answers(right, metric="exact_match"):
    """`right` rows of each domain are right, from the first on."""
    return [
        Answer(id=str(number), source=domain, domain=domain, metric=metric, answers=("yes",), question="?",
               prediction="yes" if number < right[domain] else "no", image=f"{domain}/{number}.png")
        for domain, size in SIZES.items()
        for number in range(size)
    ]  # fmt: skip


@pytest.fixture
def comparison():
    return compare_answers(
        answers({"general": 10, "document": 10}), answers({"general": 30, "document": 9}), names=("lora", "mole")
    )


def test_each_domain_has_both_scores_their_difference_and_who_was_right_alone(comparison):
    general = comparison["domains"]["general"]
    assert (general["n"], general["first"], general["second"]) == (40, 0.25, 0.75)
    assert general["difference"] == pytest.approx(0.5)
    assert (general["first_better"], general["second_better"]) == (0, 20)
    assert 0 < general["ci_low"] < 0.5 < general["ci_high"]


def test_a_difference_of_twenty_rows_is_no_chance_and_one_of_a_single_row_may_be(comparison):
    general, document = comparison["domains"]["general"], comparison["domains"]["document"]
    assert general["mcnemar_p"] == pytest.approx(2 / 2**20)
    assert general["bootstrap_p"] < 0.001
    assert document["mcnemar_p"] == 1
    assert document["bootstrap_p"] > 0.05


def test_p_values_are_adjusted_for_the_number_of_domains(comparison):
    general = comparison["domains"]["general"]
    assert general["mcnemar_p_holm"] == pytest.approx(2 * general["mcnemar_p"])
    assert general["bootstrap_p_holm"] == pytest.approx(2 * general["bootstrap_p"])


def test_the_mean_is_over_domains_and_not_over_rows(comparison):
    assert comparison["mean"]["difference"] == pytest.approx((0.5 - 0.05) / 2)


def test_the_order_of_the_files_does_not_matter(comparison):
    first, second = answers({"general": 10, "document": 10}), answers({"general": 30, "document": 9})
    assert compare_answers(first[::-1], second, names=("lora", "mole")) == comparison


def test_a_model_against_itself_differs_by_nothing():
    same = answers({"general": 10, "document": 10})
    figures = compare_answers(same, same)["domains"]["general"]
    assert (figures["difference"], figures["bootstrap_p"], figures["mcnemar_p"]) == (0, 1, 1)


def test_other_questions_are_refused():
    one = answers({"general": 1, "document": 1})
    with pytest.raises(UserError, match="59 graded answers"):
        compare_answers(one, one[1:])


def test_notes_say_what_was_asked_differently():
    row = Conversation(id="0", turns=(Turn("user", "?"),), metric="exact_match", answers=("yes",))
    first, second = (Recipe.of([row], split="test", template=name, decoding="greedy") for name in ("a", "b"))
    one = answers({"general": 1, "document": 1})
    assert compare_answers(one, one, recipes=(first, first))["notes"] == []
    (note,) = compare_answers(one, one, recipes=(first, second))["notes"]
    assert note == f"template differs: A {first.template}, B {second.template}"
    assert "A: no recipe" in compare_answers(one, one, recipes=(None, first))["notes"][0]


def test_table_and_files_show_it(comparison, tmp_path):
    ((title, heads, rows),) = comparison_tables(comparison)
    assert title == "mole against lora"
    assert all(len(row) == len(heads) for row in rows)
    assert [row[0] for row in rows] == ["document", "general", "mean"]
    assert rows[1][5:] == ["<0.001 (<0.001)", "0 / 20", "<0.001 (<0.001)"]
    write_comparison(comparison, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == comparison
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| general | 40 | 25.0 | 75.0 |" in text
    assert comparison_notes(comparison)[0] in text
