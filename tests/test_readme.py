"""What README claims and a test can check."""

import json
import re
from pathlib import Path

import pytest

from mllm.cli import app
from train.check import check_batch
from train.config import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_folder_of_the_tree_exists():
    block = README.split("## The tree")[1].split("```")[1].strip("\n")
    parent = ROOT
    for line in block.splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else ROOT / name
        assert (parent / name if line.startswith(" ") else parent).is_dir(), line


@pytest.mark.parametrize("target", ["quickstart", "test", "demo"])
def test_every_make_target_exists(target):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_every_command_exists():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"^mllm (\w+)", README, re.M))
    assert named
    assert named <= commands


def test_every_training_named_divides_its_batch_among_the_ranks_it_is_started_on():
    lines = re.findall(r"^mllm train (train/configs/\w+\.yaml)(.*)", README, re.M)
    assert lines
    for path, rest in lines:
        ranks = re.search(r"--ranks (\d+)", rest)
        check_batch(load_config(ROOT / path).run, int(ranks[1]) if ranks else 2)  # two on a CPU


def test_every_config_named_exists():
    named = re.findall(r"train/configs/\w+\.yaml", README)
    assert named
    assert all((ROOT / path).is_file() for path in named)


def test_the_quickstart_table_is_the_committed_result():
    """Each score in the table between the marks is that of studies/results/quickstart/report.json, rounded."""
    report = json.loads((ROOT / "studies" / "results" / "quickstart" / "report.json").read_text())
    table = README.split("<!-- quickstart -->")[1].split("<!-- /quickstart -->")[0]
    for arm in report["arms"].values():
        for figures in arm["domains"].values():
            assert f"{100 * figures['score']:.1f}" in table


def test_the_conflict_table_is_the_committed_result():
    folder = ROOT / "studies" / "results" / "conflict" / "look_alikes"
    summary = json.loads((folder / "summary.json").read_text())

    def told(figures: dict, name: str, scale: float, digits: int) -> str:
        score, low, high = (f"{scale * figures[key]:.{digits}f}" for key in (name, "ci_low", "ci_high"))
        return f"{score} [{low}, {high}]"

    rows = README.split("<!-- conflict -->")[1].split("<!-- /conflict -->")[0].strip().splitlines()[2:]
    scores = {told(arm["mean"], "score", 100, 1): name for name, arm in summary["arms"].items()}
    for row in rows:
        _, score, recovery = (cell.strip() for cell in row.strip("|").split("|"))
        arm = scores[score]
        if recovery.startswith(("0.", "1.", "-")):
            assert recovery == told(summary["recovery"][arm]["mean"], "recovery", 1, 2), arm
    difference = summary["differences"]["wide"]["experts"]["mean"]
    assert f"{100 * difference['difference']:+.1f} [{100 * difference['ci_low']:+.1f}" in README
