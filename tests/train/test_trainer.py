"""The loss of a step, and what the log says of it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerControl, TrainerState

from mllm.common.errors import UserError
from mllm.data.collate import Collator
from mllm.data.encoded import EncodedMixture
from mllm.data.mixture import load_mixture
from mllm.data.template import ConversationEncoder
from tests.tiny import tiny_llava
from tests.train.data import write_rows
from train.trainer import (
    Figures,
    GradientWatch,
    LogFile,
    ProgressLine,
    answer_losses,
    leave_out_frozen,
    stop_if_unusable,
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny model, encoded samples of uneven lengths, and a function that makes a batch of some of them."""
    model, processor = tiny_llava()
    mixture = load_mixture(write_rows(tmp_path_factory.mktemp("trainer")))
    samples, collate = EncodedMixture(mixture, ConversationEncoder(processor, 256)), Collator(processor)

    def batch(*rows: int) -> tuple[dict, torch.Tensor]:
        inputs = collate([samples[row] for row in rows])
        return {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}, inputs["labels"]

    return model, batch


@torch.no_grad()
def test_the_loss_is_that_of_transformers(setting):
    model, batch = setting
    inputs, labels = batch(0, 1, 2, 30)
    loss_sum_B, tokens_B = answer_losses(model, inputs, labels).by_row(4)
    expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss_sum_B.sum() / tokens_B.sum(), expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_loss_sums_do_not_depend_on_how_a_batch_is_split(setting):
    model, batch = setting
    whole_B, tokens_B = answer_losses(model, *batch(0, 1, 2, 30)).by_row(4)
    parts = [answer_losses(model, *batch(*rows)).by_row(len(rows)) for rows in ((0,), (1, 2), (30,))]
    torch.testing.assert_close(torch.cat([loss for loss, _ in parts]), whole_B, rtol=1e-5, atol=0)
    assert torch.equal(torch.cat([tokens for _, tokens in parts]), tokens_B)


def test_a_loss_that_is_not_finite_stops_with_the_rows_named():
    with pytest.raises(UserError, match=r"the loss is nan in a batch of a\.json: row 3, a\.json: row 9"):
        stop_if_unusable(torch.tensor(math.nan), torch.tensor([1, 1]), ["a.json: row 3", "a.json: row 9"])


def test_a_row_with_nothing_supervised_stops_by_name():
    with pytest.raises(UserError, match=r"nothing is supervised in a\.json: row 9"):
        stop_if_unusable(torch.tensor(1.0), torch.tensor([1, 0]), ["a.json: row 3", "a.json: row 9"])


def test_domain_losses_are_means_over_tokens_and_start_anew_after_each_entry():
    figures = Figures(["document", "general"], torch.device("cpu"))
    figures.add_answers(["general", "document"], torch.tensor([6.0, 1.0]), torch.tensor([3, 1]))
    figures.add_answers(["general"], torch.tensor([2.0]), torch.tensor([1]))
    entry = figures.drain()
    assert entry["answer_loss/general"] == 2.0
    assert entry["answer_loss/document"] == 1.0
    assert entry["answer_loss"] == 9 / 5
    assert figures.is_empty
    figures.add_answers(["general"], torch.tensor([1.0]), torch.tensor([1]))
    assert {"answer_loss": 1.0, "answer_loss/general": 1.0}.items() <= figures.drain().items()


def test_a_resumed_run_drops_the_entries_after_its_checkpoint(tmp_path):
    log = tmp_path / "train_log.jsonl"
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    LogFile(log).on_train_begin(None, TrainerState(global_step=3), TrainerControl())
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_a_warning_is_told_above_the_bar_and_kept_in_the_log(tmp_path, capsys):
    entry = {"routing/load": 1.0, "warnings": ["step 5: no token took expert 2"]}
    line, file = ProgressLine(), LogFile(tmp_path / "train_log.jsonl")
    line.training_bar = tqdm(total=1)
    for follower in (line, file):
        follower.on_log(None, TrainerState(global_step=5), TrainerControl(), logs=entry)
    assert "warning: step 5: no token took expert 2\n" in capsys.readouterr().err
    assert json.loads(file.path.read_text()) == {"step": 5, **entry}


def test_a_weight_that_never_had_a_gradient_stops_the_run_by_part_and_name():
    model = torch.nn.ModuleDict({"self_attn": torch.nn.Linear(2, 2), "norm": torch.nn.Linear(2, 2)})
    watch, state = GradientWatch(model, torch.device("cpu")), TrainerState(max_steps=99)
    for step in range(1, GradientWatch.STEPS + 1):
        state.global_step = step
        model["self_attn"](torch.ones(1, 2)).sum().backward()
        if step < GradientWatch.STEPS:
            watch.on_step_end(None, state, None)
    with pytest.raises(UserError, match=r"after 10 steps 2 of 4 .*\(other: 2\), such as norm.weight"):
        watch.on_step_end(None, state, None)


def test_a_weight_that_is_reached_in_one_of_the_first_steps_may_go_on():
    model, state = (
        torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)}),
        TrainerState(max_steps=4),
    )
    watch = GradientWatch(model, torch.device("cpu"))
    for step, name in enumerate("aaba", start=1):
        state.global_step = step
        model[name](torch.ones(1, 2)).sum().backward()
        watch.on_step_end(None, state, None)
    assert not watch.hooks


def test_a_frozen_weight_is_left_out_of_a_checkpoint_under_all_its_names():
    module = nn.ModuleDict(
        {"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False), "more": nn.Linear(2, 2)}
    )
    module["head"].weight = module["embedding"].weight
    module["head"].requires_grad_(False)
    engine = SimpleNamespace(module=module, module_state_dict=lambda **_: module.state_dict())
    leave_out_frozen(engine)
    assert set(engine.module_state_dict(exclude_frozen_parameters=True)) == {"more.weight", "more.bias"}
    assert set(engine.module_state_dict()) == set(module.state_dict())


def test_an_entry_that_a_full_disk_does_not_take_leaves_no_half_of_itself(tmp_path, monkeypatch, capsys):
    log, state = LogFile(tmp_path / "log"), SimpleNamespace(global_step=1, is_world_process_zero=True)
    log.on_log(None, state, None, {"loss": 1.0})
    before = (tmp_path / "log").read_text()

    def half(*_, **__):
        with open(tmp_path / "log", "a") as file:
            file.write('{"st')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "open", half)
        log.on_log(None, state, None, {"loss": 2.0})
    assert (tmp_path / "log").read_text() == before
    assert "No space left on device" in capsys.readouterr().err
