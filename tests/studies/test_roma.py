"""The study of router alignment, small: arms run, undo themselves, resume, and are compared seed by seed."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from rich.console import Console

from mllm.alignment import nearest, routed_layers
from studies.roma import __main__ as command
from studies.roma.analysis import analyse, discordant_p, means, paired
from studies.roma.arms import ARMS, TRIES
from studies.roma.llava import contents
from studies.roma.lora import SmallLora
from studies.roma.native import FAMILIES, HELD_OUT, MisroutedPart, NativePart, questions
from studies.roma.runs import Sizes, _weighed_by_family, run_arm, run_part
from studies.runner import RunFolder


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    return NativePart(
        work=tmp_path_factory.mktemp("native"), width=16, expert_width=16, depth=2, experts=4, first_steps=60,
        first_batch=16, train=48, validation=16, test=48, sizes=Sizes(steps=3, batch_size=8, layers=2, neighbours=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def task(part):
    return part.task(0)


def test_held_out_families_are_tested_on_and_never_trained_on(task):
    families = np.array(task.family_N)
    assert not set(families[list(task.train)]) & set(HELD_OUT)
    assert not set(families[list(task.validation)]) & set(HELD_OUT)
    assert set(families[list(task.test)]) == set(FAMILIES)
    assert not set(task.test) & ({*task.train} | {*task.validation})


def test_a_question_is_answered_by_its_familys_table():
    rows = questions(["digits_01_0", "digits_12_3"], np.random.default_rng(0))
    for ids, labels, family in zip(rows.ids, rows.labels, rows.domains, strict=True):
        (one, other), answers = FAMILIES[family]
        digits = np.array(ids[1:4]) - 3
        assert ids[5] == 3 + answers[digits[one], digits[other]]
        assert (labels != -100).tolist() == [False] * 5 + [True] * 2


def test_the_misrouted_control_differs_in_aligned_routers_alone(part):
    same = {each.name: getattr(part, each.name) for each in fields(NativePart)}
    sound, thrown = part._model(0).state_dict(), MisroutedPart(**same)._model(0).state_dict()
    changed = {name for name, weight in sound.items() if not torch.equal(weight, thrown[name])}
    assert changed == {name for name in sound if name.endswith("gate.weight")}


@pytest.mark.parametrize("arm", [*ARMS, *TRIES], ids=lambda arm: arm.name)
def test_every_arm_runs_and_leaves_the_model_as_it_was(task, part, arm):
    task.succeeded_N[:] = True  # so young a model is right too seldom
    task.succeeded_N[task.train[0]] = False
    before = {name: parameter.clone() for name, parameter in task.model.named_parameters()}
    measured = run_arm(task, arm, part.sizes, seed=0)
    assert measured.scores.exact_N.shape == (48,)
    assert measured.figures["after/ratio"] > 0
    assert all(torch.equal(before[name], parameter) for name, parameter in task.model.named_parameters())
    with torch.no_grad():
        inputs, _, _ = task.data.batch([0])
        assert not any(module._forward_hooks for name, module in task.model.named_modules() if name.endswith("proj"))
        assert inputs["hidden_BSD"].shape[0] == 1


def test_by_family_rows_weigh_as_their_family_fails_and_one_on_average(task):
    families = np.array([task.family_N[row] for row in task.train])
    succeeded_N = torch.ones(len(task.family_N), dtype=torch.bool)
    failing = [row for row, family in zip(task.train, families, strict=True) if family == "digits_01_0"]
    succeeded_N[failing] = False
    young = replace(task, succeeded_N=succeeded_N)
    found = nearest(task.embeddings_NM, k=2)
    weighed = _weighed_by_family(young, found).weights_NK.sum(1)[list(task.train)]
    assert weighed[torch.from_numpy(families == "digits_01_0")].tolist() == pytest.approx(
        [48 / len(failing)] * len(failing)
    )
    assert weighed.mean() == pytest.approx(1, rel=1e-5)


def test_lora_has_about_as_many_weights_as_the_routers(task):
    layers = routed_layers(task.model, 2)
    routers = sum(p.numel() for layer in layers for p in layer.parameters().values())
    lora = SmallLora(task.model, layers, routers)
    lora.remove()
    assert routers <= lora.num_weights <= routers + 32


def test_a_study_goes_on_where_it_stopped_and_reports(part, task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(NativePart, "task", lambda self, seed: task)
    runs, quiet = RunFolder(tmp_path / "runs"), Console(quiet=True)
    assert run_part(part, ARMS[:3], runs, 2, quiet, limit_minutes=0) == 0
    assert run_part(part, ARMS[:3], runs, 2, quiet) == 6
    (runs.path / "native-ce-s1.json").unlink()
    assert run_part(part, ARMS[:3], runs, 2, quiet) == 1
    assert run_part(part, TRIES[:1], runs, 1, quiet) == 1
    monkeypatch.setitem(command.PARTS, "native", ARMS[:2])
    monkeypatch.setattr(command, "TRIES", TRIES[:1])
    command.report(runs, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| ce |" in text
    assert "Part native, 2 seeds" in text
    assert "Part native, 1 seeds: tries" in text
    assert "| token_first |" in text


def test_the_same_files_in_another_place_are_the_same_model(tmp_path):
    for folder, text in (("one", "weights"), ("copy", "weights"), ("other", "weight")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter.safetensors").write_text(text)
    assert contents(tmp_path / "one") == contents(tmp_path / "copy") != contents(tmp_path / "other")


def rows(right: list[int], held_out: list[int]) -> dict[str, np.ndarray]:
    held = np.array(held_out, dtype=bool)
    families = np.where(held, "new", "old")
    return {"right": np.array(right, dtype=bool), "is_held_out": held, "family": families, "loss": np.ones(len(right))}


def test_trained_and_held_out_families_are_counted_apart():
    run = rows([1, 1, 0, 1], [0, 0, 1, 1])
    assert means(run, "trained") == 1.0
    assert means(run, "held out") == 0.5


def test_the_claim_is_tested_seed_by_seed_against_both_rivals():
    record = {"figures": {"before/ratio": 1.0, "after/ratio": 0.5}, "trial": {}}
    held = [1] * 8
    runs = {
        "base": [(record, rows([0] * 8, held))] * 3,
        "ce": [(record, rows([1, 0, 0, 0, 0, 0, 0, 0], held)), (record, rows([1, 1, 0, 0, 0, 0, 0, 0], held)),
               (record, rows([0] * 8, held))],
        "random": [(record, rows([1] * 8, held))] * 3,
        "true": [(record, rows([1, 1, 1, 1, 0, 0, 0, 0], held))] * 3,
    }  # fmt: skip
    for arm in runs.values():
        for _, each in arm:
            each["is_held_out"] = np.array([1, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
    claim = analyse(runs)["claim"]["held out"]
    assert claim["ce"]["difference"] == pytest.approx((3 + 2 + 4) / 3 / 7)
    assert claim["ce"]["ci_low"] > 0
    assert claim["random"]["difference"] < 0
    assert claim["ce"]["p"] <= claim["ce"]["p_holm"]


def test_paired_tests_are_the_textbooks():
    test = paired(np.array([0.01, 0.02, 0.03]))
    assert test["difference"] == pytest.approx(0.02)
    assert (test["ci_high"] - test["ci_low"]) / 2 == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-3)
    assert discordant_p([rows([1] * 6, [1] * 6)], [rows([0] * 6, [1] * 6)], "held out") == pytest.approx(2 / 64)
