"""What README claims and a test can check."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from mllm.cli import app
from train.check import check_batch, check_whole_batches
from train.config import TrainConfig, load_config
from train.conflict.config import load_conflict_config
from train.moma.config import ImageTokenizerConfig
from train.parts import adapter_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "train" / "configs").glob("*.yaml"))
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


def commands(kind: str) -> list[list[str]]:
    """Words of every `mllm KIND CONFIG …` in README, the docs and the shipped configs' heads, as a shell has them."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *CONFIGS]
    text = "\n".join(re.sub(r"^# ?", "", path.read_text(encoding="utf-8"), flags=re.M) for path in files)
    lines = re.findall(rf"^ *mllm {kind} +(train/configs/.*)", text.replace("\\\n", " "), re.M)
    return [shlex.split(line, comments=True) for line in lines]


TRAININGS = commands("train")


def overrides(words: list[str]) -> list[str]:
    return [word for word in words if "=" in word]


@pytest.mark.parametrize("words", TRAININGS, ids=" ".join)
def test_every_training_named_starts_on_one_two_and_eight_ranks_as_typed(words):
    config = load_config(ROOT / words[0], overrides(words))
    named = [int(words[words.index("--ranks") + 1])] if "--ranks" in words else [1, 2, 8]
    for ranks in named:
        check_ranks_of(config, ranks)
    if isinstance(config, TrainConfig):
        adapter_config(config.model)


STAGES = [path for path in CONFIGS if "conflict" not in path.stem]


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_every_shipped_config_starts_on_one_two_and_eight_ranks(path):
    config = load_config(path)
    for ranks in (1, 2, 8) if isinstance(config, TrainConfig) else (1,):  # experts choose over a batch of one size
        check_ranks_of(config, ranks)


def check_ranks_of(config: object, ranks: int) -> None:
    if isinstance(config, TrainConfig):
        check_batch(config.run, ranks)
    elif not isinstance(config, ImageTokenizerConfig):  # which is one process, whatever is asked for
        check_whole_batches(config.run, ranks)


def test_a_base_of_ones_own_is_tuned_at_rates_for_billions_of_weights():
    own = [load_config(ROOT / words[0], overrides(words)) for words in TRAININGS if "model.path=runs/base" in words]
    own.append(load_config(ROOT / "train" / "configs" / "llava_7b.yaml"))
    assert {config.stage for config in own} == {"align", "instruct"}
    for config in own:
        assert config.optim.lr <= {"align": 1e-3, "instruct": 2e-4}[config.stage]
        assert all(rate is None or rate <= config.optim.lr for rate in config.optim.part_lr.model_dump().values())


@pytest.mark.parametrize("words", commands("conflict"), ids=" ".join)
def test_every_study_named_has_settings_that_go_together(words):
    load_conflict_config(ROOT / words[0], overrides(words))


def test_every_extra_is_used():
    """Each library that pyproject.toml offers is imported somewhere, or is a tool of the tests."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {"scikit-learn": "sklearn", "faiss-cpu": "faiss"}
    code = "\n".join(path.read_text() for name in ("mllm", "train", "demo") for path in (ROOT / name).rglob("*.py"))
    for requirement in [each for extra, needs in extras.items() if extra != "dev" for each in needs]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"(import|from) {names.get(name, name.replace('-', '_'))}\b", code), name


def test_every_config_named_exists():
    named = re.findall(r"train/configs/\w+\.yaml", README)
    assert named
    assert all((ROOT / path).is_file() for path in named)


def test_the_quickstart_table_is_the_committed_result():
    """Each score in the table between the marks is that of benchmarks/results/quickstart.json, rounded."""
    report = json.loads((ROOT / "benchmarks" / "results" / "quickstart" / "report.json").read_text())
    table = README.split("<!-- quickstart -->")[1].split("<!-- /quickstart -->")[0]
    for arm in report["arms"].values():
        for figures in arm["domains"].values():
            assert f"{100 * figures['score']:.1f}" in table


def test_the_conflict_table_is_the_committed_result():
    folder = ROOT / "benchmarks" / "results" / "conflict" / "look_alikes"
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
