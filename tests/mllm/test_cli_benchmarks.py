"""`mllm eval --benchmark`, `--suite`, `mllm score --benchmark` and `mllm benchmarks`, as users type them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mllm.cli import app
from mllm.inference.answering import ResumableAnswers
from tests.mllm.evaluation.benchmarks.layouts import LAYOUTS
from tests.tiny import write_tiny_llava


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("pope", "mme", "mmbench", "slake"):
        (root / name).mkdir()
        LAYOUTS[name](root / name)
    return root


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def whole(base, root, tmp_path_factory) -> Path:
    """The report of the whole suite."""
    out = tmp_path_factory.mktemp("out") / "all"
    status, printed = run(
        "eval", "--model", base, "--suite", "all", "--root", root, "--out", out, "--max-new-tokens", 2, "--no-blanked"
    )
    assert status == 0, printed
    assert "not on disk, skipped: ai2d" in printed
    return out


def test_a_suite_is_scored_by_benchmark_with_its_figures(whole):
    report = json.loads((whole / "report.json").read_text())
    arm = report["arms"]["base"]
    assert {name: figures["n"] for name, figures in arm["sources"].items()} == {
        "mmbench": 5, "mmbench_circular": 14, "mme": 10, "pope": 15, "slake": 5, "slake_zh": 5,
    }  # fmt: skip
    assert "all: F1" in arm["figures"]["pope"]
    assert any(name.startswith("perception") for name in arm["figures"]["mme"])
    assert "skipped: ai2d" in report["about"]["benchmarks"]
    assert "Figures of sets" in (whole / "report.md").read_text()
    assert "acc+" in (whole / "report.html").read_text()


def test_a_killed_suite_goes_on_to_the_same_scores(whole, base, root, tmp_path, monkeypatch):
    out = tmp_path / "r"
    options = ("--suite", "all", "--root", root, "--out", out, "--max-new-tokens", 2, "--no-blanked")
    add = ResumableAnswers.add

    def add_and_die(journal: ResumableAnswers, *batch: object) -> None:
        add(journal, *batch)
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(ResumableAnswers, "add", add_and_die)
        killed = CliRunner().invoke(app, [str(word) for word in ("eval", "--model", base, *options)])
    assert str(killed.exception) == "killed"
    assert not (out / "report.json").exists()
    status, printed = run("eval", "--model", base, *options)
    assert status == 0, printed
    assert "of 54 were answered before" in printed
    arms = [json.loads((folder / "report.json").read_text())["arms"] for folder in (whole, out)]
    assert arms[0] == arms[1]


def test_stored_answers_to_a_benchmark_are_scored_without_a_model(root, tmp_path):
    from mllm.evaluation.benchmarks import find

    rows = find("mmbench").conversations(root / "mmbench")
    replies = [{"question_id": row.id, "text": f"{row.answers[0]}."} for row in rows]
    (tmp_path / "theirs.jsonl").write_text("\n".join(map(json.dumps, replies)))
    options = ("--benchmark", "mmbench", "--root", root, "--out", tmp_path / "r")
    status, printed = run("score", tmp_path / "theirs.jsonl", *options)
    assert status == 0, printed
    assert "100.0" in printed
    status, again = run("score", tmp_path / "r" / "answers" / "theirs.jsonl")  # our files carry the options with them
    assert status == 0, again
    assert "100.0" in again


def test_the_list_tells_what_is_on_disk(root):
    status, printed = run("benchmarks", "--root", root)
    assert status == 0
    assert "pope" in printed
    assert "yes" in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "what to ask is missing"),
        (("--benchmark", "pope"), "--root is missing"),
        (("--root", "."), "say which"),
        (("--suite", "all", "--root", ".", "--questions", "x.json"), "not both"),
        (("--benchmark", "pop", "--root", "."), "Did you mean 'pope'"),
        (("--suite", "medical", "--root", "."), "no suite 'medical'"),
        (("--benchmark", "gqa", "--root", "."), "gqa: no testdev_balanced_questions.json"),
        (("--benchmark", "pope", "--root", "nowhere"), "not a folder"),
    ],
)
def test_mistakes_are_told_in_words(arguments, told, tmp_path):
    status, printed = run("eval", "--model", "miniworld", "--out", tmp_path / "out", *arguments)
    assert status == 2
    assert told in printed
    assert not (tmp_path / "out").exists()
