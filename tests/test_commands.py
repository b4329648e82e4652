"""Every command that README, the docs and the heads of the shipped configs name has settings that hold as typed."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from studies.conflict.config import load_conflict_config
from train import stages
from train.check import check_batch, check_whole_batches
from train.config import TrainConfig, find_config, load_config
from train.parts import adapter_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "train" / "configs").glob("*.yaml"))
OF_A_STUDY = {"conflict", "conflict_real"}


def commands(kind: str) -> list[list[str]]:
    """Words of every `mllm KIND CONFIG …` of a shipped config, as a shell has them."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *CONFIGS]
    text = "\n".join(re.sub(r"^# ?", "", path.read_text(encoding="utf-8"), flags=re.M) for path in files)
    lines = re.findall(rf"^ *mllm {kind} +([a-z].*)", text.replace("\\\n", " "), re.M)
    typed = [shlex.split(line, comments=True) for line in lines]
    return [words for words in typed if not words[0].endswith(".yaml") or words[0].startswith("train/configs/")]


def overrides(words: list[str]) -> list[str]:
    return [word for word in words if "=" in word]


def config_of(words: list[str]) -> object:
    name = words[0]
    return load_config(ROOT / name if name.endswith(".yaml") else name, overrides(words))


TRAININGS = commands("train")


@pytest.mark.parametrize("words", TRAININGS, ids=" ".join)
def test_every_training_named_starts_on_one_two_and_eight_ranks_as_typed(words):
    config = config_of(words)
    for ranks in [int(words[words.index("--ranks") + 1])] if "--ranks" in words else [1, 2, 8]:
        check_ranks_of(config, ranks)
    if isinstance(config, TrainConfig):
        adapter_config(config.model)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem not in OF_A_STUDY], ids=lambda path: path.stem)
def test_every_shipped_config_starts_on_one_two_and_eight_ranks(path):
    config = load_config(path)
    for ranks in (1, 2, 8) if isinstance(config, TrainConfig) else (1,):  # experts choose over a batch of one size
        check_ranks_of(config, ranks)


def check_ranks_of(config: object, ranks: int) -> None:
    if isinstance(config, TrainConfig):
        check_batch(config.run, ranks)
    elif not stages.is_alone(stages.find(config.stage)):  # that is one process, whatever is asked for
        check_whole_batches(config.run, ranks)


def test_a_base_of_billions_of_weights_is_tuned_at_rates_that_suit_it():
    typed = [words for words in TRAININGS if any(word.startswith("model.path=models/") for word in words)]
    own = [*(config_of(words) for words in typed), load_config("llava_7b")]
    assert {config.stage for config in own} == {"projector", "instruct"}
    for config in own:
        assert config.optim.lr <= {"projector": 1e-3, "instruct": 2e-4}[config.stage]
        assert all(rate is None or rate <= config.optim.lr for rate in config.optim.part_lr.model_dump().values())


@pytest.mark.parametrize("words", commands("conflict"), ids=" ".join)
def test_every_study_named_has_settings_that_go_together(words):
    load_conflict_config(find_config(words[0]), overrides(words))


def test_every_extra_is_used():
    """Each library that pyproject.toml offers is imported somewhere, or is a tool of the tests or the docs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {"scikit-learn": "sklearn", "faiss-cpu": "faiss"}
    code = "\n".join(path.read_text() for name in ("mllm", "train", "demo") for path in (ROOT / name).rglob("*.py"))
    for requirement in [each for extra, needs in extras.items() if extra not in ("dev", "docs") for each in needs]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"(import|from) {names.get(name, name.replace('-', '_'))}\b", code), name
