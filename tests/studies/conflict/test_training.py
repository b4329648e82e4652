"""Trainings on a tiny LLaVA: what is trained on what, what is kept, and that the base stays as it was."""

import json

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from studies.conflict.__main__ import main
from studies.conflict.arms import adapter_of
from studies.conflict.config import load_conflict_config
from studies.conflict.data import embed
from studies.conflict.report import tables
from studies.conflict.study import Job
from studies.conflict.training import parts, peak_memory, reset_peak_memory, schedule_of, train_and_score
from studies.conflict.work import Worker
from studies.finetune import score_answers
from tests.studies.conflict.toy import write_rows
from tests.tiny import write_tiny_llava

QUIET = Console(quiet=True)
ARMS = ["single", "mix", "wide", "full", "mole", "mole_oracle"]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_tiny_llava(folder / "base")
    settings = {
        "model": {"path": str(folder / "base"), "dtype": "fp32", "device": "cpu"},
        "data": {split: str(write_rows(folder, split)) for split in ("train", "val", "test")},
        "adapter": {"r": 2, "lora_alpha": 4},
        "run": {
            "out": str(folder / "out"),
            "arms": ARMS,
            "batch_size": 4,
            "lrs": [1e-3, 1e-2],
            "seeds": 2,
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(settings))
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def worker(config_path):
    return Worker(load_conflict_config(config_path, ["run.arms=all"]))


@pytest.fixture(scope="module")
def data(worker):
    return embed(worker.base, worker.processor, worker._rows)


def job_of(worker, name, **changes):
    arm = next(arm for arm in worker.study.config.arms if arm.name == name)
    return Job(**{"arm": arm, "split": "test", "rate": 1e-2, "seed": 0} | changes)


def test_single_trains_a_model_on_each_domain_with_the_samples_that_mix_has(worker, data):
    arms = {arm.name: arm for arm in worker.study.config.arms}
    (mixed, times, scored), *others = parts(arms["mix"], data, data.test)
    alone = list(parts(arms["single"], data, data.test))
    assert (times, scored, others) == (1, list(range(12)), [])
    assert sorted(row for rows, _, _ in alone for row in rows) == mixed
    for domain, (rows, _, places) in zip(("document", "general"), alone, strict=True):
        assert {data.train.domains[row] for row in rows} == {data.test.cached.domains[place] for place in places}
        assert {data.train.domains[row] for row in rows} == {domain}


def test_steps_follow_from_samples_so_twice_takes_twice_as_many(worker, data):
    steps = {}
    for name in ("single", "mix", "twice"):
        job = job_of(worker, name)
        rounds = parts(job.arm, data, data.test)
        steps[name] = [schedule_of(job, worker.study.config, len(rows) * times).steps for rows, times, _ in rounds]
    assert steps == {"single": [2, 2], "mix": [3], "twice": [6]}  # 6, 12 and 24 samples in batches of 4


@pytest.mark.parametrize("name", ["single", "full", "mole", "nulls", "mole_linear"])
def test_a_run_leaves_the_base_bit_for_bit_as_it_was(worker, data, name):
    before = {key: value.clone() for key, value in worker.base.state_dict().items()}
    record, columns = train_and_score(job_of(worker, name), worker.study, worker.base, data)
    after = worker.base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not np.array_equal(columns["loss"], score_answers(worker.base, data.test.cached).loss)
    assert (record["routing"] is not None) == (name in ("mole", "nulls", "mole_linear"))


def test_the_base_is_scored_as_it_is(worker, data):
    record, columns = train_and_score(job_of(worker, "base"), worker.study, worker.base, data)
    assert np.array_equal(columns["loss"], score_answers(worker.base, data.test.cached).loss)
    assert record["cost"]["trained_parameters"] == 0


def test_routers_that_start_right_learn_slowly_and_all_else_at_the_arms_rate(worker):
    for name, router in (("experts", 1e-3), ("fast_router", 1e-2), ("mole", 1e-2)):
        optim = schedule_of(job_of(worker, name), worker.study.config, 12).optim
        assert (optim.lr, optim.part_lr.router) == (1e-2, pytest.approx(router))
        assert worker.study.recipe(job_of(worker, name))["router_lr"] == pytest.approx(router)


def test_another_default_of_the_adapter_is_another_recipe(worker, monkeypatch):
    before = worker.study.name(job_of(worker, "mole"))
    monkeypatch.setattr("studies.conflict.study.adapter_of", lambda arm, values: adapter_of(arm, values | {"top_k": 2}))
    assert worker.study.name(job_of(worker, "mole")) != before


def test_full_trains_the_language_model_and_nothing_before_it(worker, data):
    record, _ = train_and_score(job_of(worker, "full"), worker.study, worker.base, data)
    weights = worker.base.get_decoder().parameters()
    head = worker.base.get_output_embeddings().weight
    assert record["cost"]["trained_parameters"] == sum(weight.numel() for weight in weights) + head.numel()
    assert job_of(worker, "full").lr == pytest.approx(1e-3)  # a tenth of the grid's


def test_the_same_job_gives_the_same_scores_and_another_seed_others(worker, data):
    first, again, other = (
        train_and_score(job_of(worker, "mole", seed=seed), worker.study, worker.base, data)[1]["loss"]
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_costs_put_the_arms_in_order(worker, data):
    costs = {
        name: train_and_score(job_of(worker, name), worker.study, worker.base, data)[0]["cost"]
        for name in ("full", "mix", "mole", "wide", "single")
    }
    flops = {name: cost["flops"] for name, cost in costs.items()}
    needed = {name: cost["needed_flops"] for name, cost in costs.items()}
    assert flops["full"] < flops["mix"] < flops["mole"]
    assert needed["mix"] < needed["mole"] < needed["wide"]  # one expert, one and a router, all of them
    assert costs["single"]["trained_parameters"] == 2 * costs["mix"]["trained_parameters"]
    expert = costs["mix"]["trained_parameters"]
    active = {name: cost["active_parameters"] for name, cost in costs.items()}
    assert active["mix"] == pytest.approx(active["full"] + expert)
    assert active["wide"] == pytest.approx(active["full"] + 2 * expert)  # two domains, so two experts


def test_peak_memory_counts_from_the_last_reset():
    reset_peak_memory()
    before = peak_memory()
    if before is None:
        pytest.skip("peak memory is read from Linux's /proc, which this system lacks")
    torch.ones(2**26)  # 256 MiB, gone at once
    grown = peak_memory()
    reset_peak_memory()
    assert grown - before > 200
    assert peak_memory() < grown - 200


def test_a_whole_study_from_the_command_line_and_its_report_from_kept_runs_alone(config_path, capsys, monkeypatch):
    folder = config_path.parent / "out"
    assert main([str(config_path)]) == 0
    printed = capsys.readouterr().out
    assert "Score per domain" in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["arms"]) == ARMS
    assert summary["seeds"] == [0, 1]
    assert "commit" in summary["provenance"]
    routed = {name for name, arm in summary["arms"].items() if arm["routing"]}
    assert routed == {"mole", "mole_oracle"}
    oracle = summary["arms"]["mole_oracle"]["routing"]["summary"]
    assert oracle["routing/mi_domain_ratio"] == pytest.approx(1.0)
    for name in ("README.md", "conflict.png", "routing.png", "study.json"):
        assert (folder / name).stat().st_size > 0
    readme = (folder / "README.md").read_text()
    assert all(title in readme for title, *_ in tables(summary))
    (folder / "README.md").unlink()
    monkeypatch.setattr("studies.conflict.work.Worker.__init__", None)  # neither base nor data may be read
    assert main([str(config_path), "--report"]) == 0
    assert (folder / "README.md").read_text() == readme
