"""Stages of the early-fusion model on the real DeepSpeed engine with two gloo ranks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mllm.moma import MomaForCausalLM
from mllm.moma.generation import load_moma
from tests.train.moma_data import write_moma_config
from tests.train.ranks import run_stage

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
SPLIT_ALL = "deepspeed.persist_below=0"  # else ZeRO-3 would leave weights as small as these whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("moma")
    write_moma_config(path)
    return path


def run(folder: Path, name: str, *overrides: str, world: int = 2) -> Path:
    """A run on two ranks, or another number, into folder/name."""
    run_stage(folder / "moma.yaml", f"run.output_dir={folder / name}", "run.report_to=none", *overrides, world=world)
    return folder / name


def log(output: Path) -> list[dict]:
    entries = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def losses(output: Path) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in log(output)])


def history(output: Path) -> dict:
    return json.loads((output / "model" / "training.json").read_text())


@pytest.fixture(scope="module")
def zero_0(folder):
    return run(folder, "zero_0", "deepspeed.zero=0")


@pytest.fixture(scope="module")
def seed(folder):
    return run(folder, "seed", "model.preset=1t1i")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_and_model_are_the_same_under_every_zero_stage(folder, zero_0, stage):
    other = run(folder, f"zero_{stage}", f"deepspeed.zero={stage}", SPLIT_ALL, "run.save_every=3")
    assert len(losses(zero_0)) == 5
    torch.testing.assert_close(losses(other), losses(zero_0), rtol=1e-5, atol=0)
    expected, found = (load_file(output / "model" / "model.safetensors") for output in (zero_0, other))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)
    resumed = run(
        folder,
        f"resumed_{stage}",
        f"deepspeed.zero={stage}",
        SPLIT_ALL,
        f"run.resume={other}/checkpoints/checkpoint-3",
        "run.save_every=3",
    )
    torch.testing.assert_close(losses(resumed)[-2:], losses(zero_0)[-2:], rtol=1e-5, atol=0)
    again = load_file(resumed / "model" / "model.safetensors")
    for name in found:  # thresholds too, which no loss of training shows
        torch.testing.assert_close(again[name], found[name], rtol=1e-4, atol=1e-5, msg=name)


def test_depths_tied_embeddings_and_checkpointing_under_zero_3_are_as_without(folder):
    fields = (
        "model.fields={hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2, "
        "mixture_of_depths: 0.5, tie_word_embeddings: true}"
    )
    plain = run(folder, "plain", fields, "deepspeed.zero=0")
    split = run(folder, "split", fields, "deepspeed.zero=3", SPLIT_ALL, "model.gradient_checkpointing=true")
    torch.testing.assert_close(losses(split), losses(plain), rtol=1e-5, atol=0)
    (one, _), (other, _) = (load_moma(output / "model") for output in (plain, split))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    for (name, weight), found in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-4, msg=name)


def test_in_bf16_token_choice_with_null_experts_learns_what_it_learns_in_fp32(folder):
    fields = (
        "model.fields={hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2, "
        "routing: token_choice, num_null_experts: 2, num_experts_per_tok: 2, shared_expert_intermediate_size: 8}"
    )
    fine = run(folder, "fp32", fields, "data.image_share=experts", "deepspeed.zero=3", SPLIT_ALL)
    rough = run(folder, "bf16", fields, "deepspeed.zero=3", SPLIT_ALL, "model.dtype=bf16")
    assert not torch.equal(losses(rough), losses(fine))
    torch.testing.assert_close(losses(rough), losses(fine), rtol=0.01, atol=0)
    weights = load_file(rough / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_the_log_tells_losses_by_direction_and_that_they_are_leaky(zero_0):
    last = log(zero_0)[-1]
    assert {
        "loss_leaky/text",
        "loss_leaky/image",
        "loss_leaky/image_to_text",
        "loss_leaky/text_to_image",
    } <= last.keys()
    assert last["routing/load"] == pytest.approx(1, abs=0.01)  # experts chosen over the batch: one a token
    assert last["tokens_per_second"] > 0


def test_a_saved_model_is_read_with_its_tokenizers(zero_0):
    model, processor = load_moma(zero_0 / "model")
    processor.check(model.config)
    assert history(zero_0)["rows_seen"] == 5 * 8


def test_a_global_batch_of_two_ranks_is_one_ranks_batch_of_twice_the_size(folder, zero_0):
    # The definition: with choice_batch=global the experts choose among the micro-batches of all ranks together, so two
    # ranks of 4 rows learn what one of 8 learns, and what two ranks of 4 that choose by themselves do not.
    fields = "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2, choice_batch: %s}"
    together = run(folder, "global", f"model.fields={fields % 'global'}", "run.micro_batch_size=4")
    apart = run(folder, "rank", f"model.fields={fields % 'rank'}", "run.micro_batch_size=4")
    alone = run(folder, "alone", f"model.fields={fields % 'rank'}", "run.micro_batch_size=8", world=1)
    torch.testing.assert_close(losses(together), losses(alone), rtol=1e-5, atol=0)
    assert (losses(apart) - losses(alone)).abs().max() > 1e-4


def test_auxiliary_routers_learn_and_nothing_else_does(folder, zero_0):
    start = f"model={{start_from: '{zero_0}/model'}}"
    output = run(
        folder,
        "aux",
        "stage=train_causal_routers",
        start,
        "deepspeed.zero=3",
        SPLIT_ALL,
        "optim.lr=0.05",
        "run.steps=12",
    )
    before, after = (load_file(path / "model" / "model.safetensors") for path in (zero_0, output))
    added = after.keys() - before.keys()
    assert added
    assert all("auxiliary" in name for name in added)
    for name, weight in before.items():
        if not name.endswith(("threshold", "batches_seen")):
            assert torch.equal(after[name], weight), name
    assert losses(output)[-3:].mean() < losses(output)[0]
    assert MomaForCausalLM.from_pretrained(output / "model").config.causal_routing == "aux"
    assert history(output)["rows_seen"] == 40 + 12 * 8
    assert 0 <= log(output)[-1]["auxiliary/recall"] <= 1


def test_upcycling_goes_on_with_the_data_and_starts_from_copies(folder, seed):
    start = f"model={{start_from: '{seed}/model', preset: 2t2i}}"
    output = run(folder, "upcycled", "stage=upcycle", start, "optim.lr=1e-12")
    one, many = (load_file(path / "model" / "model.safetensors") for path in (seed, output))
    name = "model.layers.0.ffn.experts.down_proj"
    for expert, source in enumerate((0, 0, 1, 1)):
        torch.testing.assert_close(many[name][expert], one[name][source], atol=1e-6, rtol=1e-5)
    assert history(output)["rows_seen"] == 40 + 40
    rates, seeds = ([entry["learning_rate"] for entry in log(path)] for path in (output, seed))
    assert len(set(seeds)) > 1
    assert [rate / 1e-12 for rate in rates] == pytest.approx(
        [rate / 1e-2 for rate in seeds]
    )  # its schedule starts anew
