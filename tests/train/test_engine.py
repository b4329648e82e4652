"""The real DeepSpeed engine on two gloo ranks.

A launch costs some twenty seconds, so only claims on the launcher itself go through it; other runs are forked (see
ranks.py), and several claims share a run.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mllm
import train
import train.trainer
from mllm.data.mixture import load_mixture
from tests.train.data import write_config
from tests.train.ranks import be_rank, run_stage
from train.config import load_config
from train.feed import RunOrder
from train.launch import launch
from train.status import STOPPED

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
SPLIT_ALL = "deepspeed.persist_below=0"  # else ZeRO-3 would leave weights as small as these whole
# shipped configs that differ in model.adapter alone
ROUTINGS = ("mole", "adamoe", "moma_groups", "combined", "experts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("engine")
    write_config(path)
    return path


def run(folder: Path, name: str, *overrides: str) -> Path:
    """A run on two ranks into folder/name."""
    run_stage(folder / "config.yaml", f"run.output_dir={folder / name}", *overrides)
    return folder / name


def log(output: Path) -> dict[int, dict]:
    """Step -> its entry."""
    entries = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry for entry in entries if "loss" in entry}


def losses(output: Path) -> dict[int, float]:
    return {step: entry["loss"] for step, entry in log(output).items()}


def adapter_of(config: str, **changes) -> str:
    """`model.adapter` of a shipped config as an override."""
    path = Path(train.__file__).parent / "configs" / f"{config}.yaml"
    return f"model.adapter={json.dumps(load_config(path).model.adapter | changes)}"


@pytest.fixture(scope="module")
def zero_0(folder):
    return run(folder, "zero_0", "deepspeed.zero=0")


@pytest.fixture(scope="module")
def zero_2(folder):
    """Through the launcher."""
    overrides = [f"run.output_dir={folder / 'zero_2'}", "deepspeed.zero=2", "run.save_every=3"]
    assert launch(folder / "config.yaml", overrides, num_processes=2) == 0
    return folder / "zero_2"


@pytest.fixture(scope="module")
def zero_3(folder):
    return run(folder, "zero_3", "deepspeed.zero=3", SPLIT_ALL, "data.workers=1")


@pytest.fixture(scope="module")
def resumed(folder, zero_2):
    checkpoint = zero_2 / "checkpoints" / "checkpoint-3"
    return run(folder, "resumed", f"run.resume={checkpoint}")


@pytest.fixture(scope="module")
def biased(folder):
    """Balance by a bias, under ZeRO-3 and with an entry every second step: a whole run, and its second half again."""
    adapter = adapter_of("mole", balance="bias", bias_update_rate=0.125)
    options = (adapter, "run.save_every=3", "run.log_every=2", "run.report_to=none", "deepspeed.zero=3", SPLIT_ALL)
    whole = run(folder, "bias", *options)
    return whole, run(folder, "bias_resumed", *options, f"run.resume={whole}/checkpoints/checkpoint-3")


@pytest.fixture(scope="module")
def aligned(folder):
    """Stage align in one process and bf16, started without a launcher."""
    overrides = ["stage=projector", "model.adapter=null", "model.dtype=bf16", f"run.output_dir={folder / 'align'}"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "train", str(folder / "config.yaml"), *overrides, "run.save_every=5"]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return folder / "align", output


@pytest.fixture(scope="module")
def tuned_in_bf16(folder, aligned):
    """Stage instruct in bf16 under ZeRO-3, from the aligned projector, with recomputed activations."""
    start = f"model.start_from={aligned[0] / 'adapter'}"
    options = ("model.dtype=bf16", "model.gradient_checkpointing=true", "deepspeed.zero=3", SPLIT_ALL)
    return run(folder, "bf16", start, *options)


def test_five_losses_are_the_same_under_zero_0_2_and_3(zero_0, zero_2, zero_3):
    # In fp32 the stages differ in the order of sums alone: at most 2e-7 of the loss was seen, 1e-5 leaves room for
    # other machines. (In bf16 ZeRO-3 adds a linear's bias after rounding the product, others before: 1e-3.)
    expected = torch.tensor(list(losses(zero_0).values()))
    assert len(expected) == 5
    for other in (zero_2, zero_3):
        torch.testing.assert_close(torch.tensor(list(losses(other).values())), expected, rtol=1e-5, atol=0)


def test_the_gradient_norm_is_logged_alike_under_every_zero_stage(zero_0, zero_2, zero_3):
    first, second, third = (
        [entry["grad_norm"] for entry in log(output).values()] for output in (zero_0, zero_2, zero_3)
    )
    assert first == pytest.approx(second, rel=1e-4)
    assert first == pytest.approx(third, rel=1e-2)


def test_ranks_that_hold_only_text_step_together_with_ranks_that_hold_pictures(folder, zero_2, zero_3):
    config = load_config(folder / "config.yaml")
    mixture = load_mixture(config.data.mixture)
    shape = {"seed": config.run.seed, "steps": 5, "batch_size": 8, "micro_batch_size": 2, "world": 2}
    batches = zip(*(RunOrder(mixture, rank=rank, **shape) for rank in (0, 1)), strict=True)
    kinds = {tuple({mixture.domain_of_row[row] for row in batch} == {"numbers"} for batch in pair) for pair in batches}
    assert kinds & {(True, False), (False, True)}
    assert len(losses(zero_2)) == len(losses(zero_3)) == 5


def test_an_adapter_saved_under_zero_3_is_whole_and_equals_that_of_zero_2(folder, zero_2, zero_3):
    two, three = (load_file(output / "adapter" / "adapter_model.safetensors") for output in (zero_2, zero_3))
    assert two.keys() == three.keys()
    for name in two:
        torch.testing.assert_close(three[name], two[name], rtol=1e-3, atol=1e-4)
    model, _ = mllm.load(folder / "base", adapter=zero_3 / "adapter")
    assert any((value != 0).any() for name, value in model.named_parameters() if name.endswith("default.B"))


def test_resuming_continues_the_loss_curve(zero_2, resumed):
    first, second = losses(zero_2), losses(resumed)
    assert list(second) == [4, 5]
    assert [second[step] for step in (4, 5)] == pytest.approx([first[step] for step in (4, 5)], rel=1e-6)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(zero_2, resumed):
    whole, halves = (load_file(output / "adapter" / "adapter_model.safetensors") for output in (zero_2, resumed))
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-5, atol=1e-7)


def test_a_run_that_was_asked_to_stop_goes_on_to_the_weights_of_an_uninterrupted_one(folder, zero_2):
    output = folder / "stopped"
    run_stage(
        folder / "config.yaml", f"run.output_dir={output}", "run.max_hours=1e-9", "data.workers=1", status=STOPPED
    )
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert not (output / "adapter").exists()
    run(folder, "stopped")
    whole, halves = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (zero_2, output))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def be_rank_on_a_full_disk(rank: int, *arguments) -> None:
    """Rank 1 cannot write its part of the first checkpoint, rank 0 not the adapter of the second."""
    save, write, calls = torch.save, train.trainer.write_adapter, Counter()

    def full(function, only: int, time: int):
        def called(*values, **named):
            is_file = any(isinstance(value, str | Path) for value in values)  # torch sends objects by `save`, too
            calls[function] += is_file
            if is_file and rank == only and calls[function] == time:
                raise OSError(28, "No space left on device")
            return function(*values, **named)

        return called

    torch.save, train.trainer.write_adapter = full(save, 1, 1), full(write, 0, 2)
    # The fork server, and so a rank, writes where the test wrote that first needed it: what is said goes to a file.
    (output,) = [word.partition("=")[2] for word in arguments[-1] if word.startswith("run.output_dir=")]
    with Path(f"{output}-{rank}.err").open("w", buffering=1) as said, redirect_stderr(said):
        be_rank(rank, *arguments)


def test_a_checkpoint_that_one_rank_cannot_write_is_told_and_the_run_lives_on(folder, zero_2):
    output = folder / "full"
    options = (f"run.output_dir={output}", "run.save_every=1")
    run_stage(folder / "config.yaml", *options, target=be_rank_on_a_full_disk)
    said = (folder / "full-0.err").read_text()
    assert "checkpoint-1 is not saved: another rank" in said
    assert "checkpoint-2 is not saved: No space left on device. Training goes on" in said
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-5"]
    whole, lived = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (zero_2, output))
    assert all(torch.equal(whole[name], lived[name]) for name in whole)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_shipped_routing_trains_alike_under_zero_2_and_3(folder, routing):
    options = (adapter_of(routing), "run.steps=3", "run.report_to=none")
    two = run(folder, f"{routing}_2", "deepspeed.zero=2", *options)
    three = run(folder, f"{routing}_3", "deepspeed.zero=3", SPLIT_ALL, *options)
    figures = ("loss", "balance_loss", "routing/load", "routing/null_share", "routing/router_grad_norm")
    for step, entry in log(two).items():
        assert {name: log(three)[step][name] for name in figures} == pytest.approx(
            {name: entry[name] for name in figures}, rel=1e-4
        )
        assert entry["routing/router_grad_norm"] > 0
    for output in (two, three):
        mllm.load(folder / "base", adapter=output / "adapter")


def test_a_bias_that_no_gradient_moves_is_saved_and_resumed_under_zero_3(biased):
    whole, halves = biased
    folders = (whole / "checkpoints" / "checkpoint-3", whole, halves)
    at_3, at_5, resumed = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    biases = [name for name in at_5 if name.endswith("selection_bias")]
    assert len(biases) == 2
    for name in biases:
        assert (at_3[name] != 0).any()
        assert torch.equal(resumed[name], at_5[name])
    assert any((at_3[name] != at_5[name]).any() for name in biases)


def test_the_steps_after_the_last_entry_are_told_at_the_end(biased):
    *_, last = [json.loads(line) for line in (biased[0] / "train_log.jsonl").read_text().splitlines()]
    assert list(log(biased[0])) == [2, 4]
    assert last["step"] == 5
    assert {"train_loss", "answer_loss", "routing/load"} <= last.keys()


def test_a_checkpoint_is_whole_holds_an_adapter_and_no_frozen_weights(zero_2):
    folder = zero_2 / "checkpoints" / "checkpoint-3"
    assert {path.name for path in folder.parent.iterdir() if path.is_dir()} >= {"checkpoint-3"}
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    states = next(folder.glob("global_step*/mp_rank_00_model_states.pt"))
    names = torch.load(states, weights_only=False)["module"].keys()
    assert names
    assert not any(name.endswith("base_layer.weight") or "vision_tower" in name for name in names)


def test_the_log_tells_loss_by_domain_routing_and_rate(zero_2):
    entry = json.loads((zero_2 / "train_log.jsonl").read_text().splitlines()[0])
    assert {"answer_loss/pictures", "answer_loss/numbers", "balance_loss", "routing/entropy", "learning_rate"} <= set(
        entry
    )
    assert entry["samples_per_second"] > 0
    assert entry["epoch"] == pytest.approx(8 / 64)
    assert list((zero_2 / "tensorboard").iterdir())


def test_a_single_process_aligns_the_projector_and_says_what_it_trains(folder, aligned):
    output, said = aligned
    assert {path.name for path in (output / "adapter").iterdir()} == {"projector.safetensors", "base.json"}
    names = load_file(output / "adapter" / "projector.safetensors").keys()
    base, after = mllm.load(folder / "base")[0], mllm.load(folder / "base", adapter=output / "adapter")[0]
    before, after = (model.get_submodule("model.multi_modal_projector").state_dict() for model in (base, after))
    assert not any(torch.equal(before[name], after[name]) for name in names)
    assert "projector" in said
    assert "ASSISTANT:" in said
    assert "supervised" in said
    states = next((output / "checkpoints").glob("checkpoint-5/global_step*/mp_rank_00_model_states.pt"))
    assert all("multi_modal_projector" in name for name in torch.load(states, weights_only=False)["module"])


def test_bf16_under_zero_3_keeps_trained_weights_in_fp32(folder, tuned_in_bf16):
    weights = load_file(tuned_in_bf16 / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any((weight != weight.bfloat16().float()).any() for name, weight in weights.items() if "router" in name)
    assert losses(tuned_in_bf16)[5] < losses(tuned_in_bf16)[1]
    mllm.load(folder / "base", adapter=tuned_in_bf16 / "adapter")


def test_a_truncated_picture_stops_all_ranks_by_name_and_leaves_no_folder(folder, tmp_path, capfd):
    picture = (folder / "images" / "red.png").read_bytes()
    rows = [{**row, "image": "cut.png"} if row.get("image") == "red.png" else row for row in read_rows(folder)]
    (folder / "images" / "cut.png").write_bytes(picture[: len(picture) // 2])
    (folder / "cut.json").write_text(json.dumps(rows))
    (folder / "cut.yaml").write_text("sources: [{path: cut.json, image_root: images}]")
    overrides = [f"data.mixture={folder / 'cut.yaml'}", f"run.output_dir={tmp_path / 'run'}", "data.workers=1"]
    overrides.append("run.log_every=100")  # a folder with a log would be kept
    status = launch(folder / "config.yaml", overrides, num_processes=2)
    said = capfd.readouterr().err
    assert status == 2
    assert "cut.json: row" in said
    assert "cut.png cannot be decoded" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def read_rows(folder: Path) -> list[dict]:
    return json.loads((folder / "train.json").read_text())
