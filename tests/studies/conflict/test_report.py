"""What a report says of made-up scores, and the table over several regimes."""

import json

import pytest
from rich.console import Console

from mllm.common.errors import UserError
from studies.conflict.regimes import report_all
from studies.conflict.report import notes, read_study, report, sentences, summarise, tables, write_facts
from studies.conflict.work import work
from studies.runner import RunFolder
from tests.studies.conflict.toy import FACTS, SHARES, ToyWorker, toy_config

QUIET = Console(quiet=True)


def reported(folder, shares=SHARES, **run):
    worker = ToyWorker(folder, shares, **run)
    work(worker, RunFolder(folder / "runs"), QUIET)
    return report(worker.study, RunFolder(folder / "runs"), QUIET)


@pytest.fixture(scope="module")
def hurting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hurting")
    return reported(folder), folder


def table(summary, title):
    return {name: rows for name, _, rows in tables(summary)}[title]


def test_the_first_sentence_says_that_mixing_hurts_and_the_last_who_recovers_most(hurting):
    summary, folder = hurting
    first, *_, last = sentences(summary)
    assert first.startswith("Mixing hurts: single − mix is +")
    assert last.startswith("Most is recovered by mole: ")
    assert first in (folder / "README.md").read_text()


def test_who_recovers_most_is_no_control(tmp_path):
    summary = reported(tmp_path, SHARES | {"mole_oracle": 0.95}, arms=["single", "mix", "mole", "mole_oracle"])
    recovery = {arm: told["mean"]["recovery"] for arm, told in summary["recovery"].items()}
    assert recovery["mole_oracle"] > recovery["mole"]
    assert sentences(summary)[-1].startswith("Most is recovered by mole: ")


def test_what_only_validation_looked_at_has_a_table_of_its_own(tmp_path):
    summary = reported(tmp_path, arms=["single", "mix"], only_tuned=["mole"])
    assert "mole" not in summary["arms"]
    assert summary["left_out"] == []
    rows = table(summary, "Tried on validation alone, not scored on test")
    assert rows == [["mole", "0.001: 60.0", "0.01: 70.0 *"]]
    assert any("experts as LLaVA-MoLE claims them" in note for note in notes(summary))


def test_where_mixing_does_not_hurt_the_report_says_that_nothing_can_be_recovered(tmp_path):
    summary = reported(tmp_path, dict.fromkeys(SHARES, 0.7), seeds=1)
    assert sentences(summary)[0].startswith("No conflict is shown: mixing does not hurt here")
    assert "no method can help" in (tmp_path / "README.md").read_text()
    assert all(set(row[1:]) == {"–"} for row in table(summary, "Conflict and recovery")[1:])


def test_where_mixing_helps_the_report_says_so(tmp_path):
    summary = reported(tmp_path, SHARES | {"single": 0.2, "mix": 0.9})
    assert "so it helps" in sentences(summary)[0]


def test_without_single_no_conflict_is_claimed(tmp_path):
    summary = reported(tmp_path, arms=["mix", "mole"], seeds=1)
    assert summary["conflict"] is None
    assert "add it to run.arms" in sentences(summary)[0]


def test_every_arm_is_compared_with_mix_and_with_as_many_weights(hurting):
    summary, _ = hurting
    assert {other: set(arms) for other, arms in summary["differences"].items()} == {
        "mix": {"wide", "mole"},
        "wide": {"mix", "mole"},
    }
    assert [row[0] for row in table(summary, "Differences, mean of domains")] == ["mix", "wide", "mole"]


def test_a_best_rate_at_the_end_of_the_grid_is_told(hurting):
    summary, _ = hurting
    assert any("widen run.lrs" in note and "mole" in note for note in notes(summary))
    assert table(summary, "Learning rates on validation")[0] == ["single", "0.001: 80.0", "0.01: 90.0 *"]


def test_too_few_steps_of_single_are_told(hurting, tmp_path):
    assert any("`single` has fewer than 100 steps" in note for note in notes(hurting[0]))  # 24 rows in batches of 8
    many = reported(tmp_path, batch_size=1, passes=5, seeds=1)
    assert not any("has fewer than" in note for note in notes(many))


def test_arms_and_seeds_that_are_missing_are_left_out_and_named(tmp_path):
    worker = ToyWorker(tmp_path)
    runs = RunFolder(tmp_path / "runs")
    work(worker, runs, QUIET)
    mole, mix = (next(arm for arm in worker.study.config.arms if arm.name == name) for name in ("mole", "mix"))
    last = {arm.name: worker.study.name(worker.study.finals(arm, runs)[2]) for arm in (mole, mix)}
    (runs.path / f"{last['mix']}.json").unlink()
    for path in runs.path.glob("mole-*.json"):
        path.unlink()
    summary = summarise(worker.study, runs)
    assert (summary["seeds"], list(summary["arms"])) == ([0, 1], ["single", "mix", "wide"])
    assert summary["left_out"] == ["arms without a finished seed: mole", "seeds that not every arm has: 2"]


def test_a_summary_is_strict_json_and_says_no_path(hurting):
    summary, folder = hurting
    text = (folder / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == summary
    assert str(folder) not in text


def test_a_report_before_a_run_is_refused_in_words(tmp_path):
    with pytest.raises(UserError, match=r"holds no study\.json: run the study"):
        read_study(toy_config(tmp_path))


def test_what_recipes_need_is_read_back_from_the_folder(tmp_path):
    worker = ToyWorker(tmp_path)
    write_facts(worker.study, tmp_path)
    assert read_study(worker.study.config).facts == FACTS


def test_several_regimes_make_one_table_with_a_line_each(hurting, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text(json.dumps(hurting[0] | {"regime": "strong clash"}))
    reported(tmp_path / "b", dict.fromkeys(SHARES, 0.7), seeds=1)
    text = report_all(tmp_path, QUIET).read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 2
    assert "strong clash" in lines[0]
    assert "| yes | mole " in lines[0]
    assert "recovery, base" not in text
    assert "| not shown | – |" in lines[1]
    with pytest.raises(UserError, match=r"no summary\.json in any folder"):
        report_all(tmp_path / "a", QUIET)
