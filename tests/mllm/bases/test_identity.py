"""An adapter knows its base by all of it, however the base is stored, and whatever was trained on it before."""

import json

import peft
import pytest
import torch

import mllm
from mllm.build import write_base_card
from mllm.common.errors import UserError
from tests.tiny import write_tiny_llava

WEIGHTS = {
    "projector": "model.multi_modal_projector.linear_2.bias",
    "language model": "model.language_model.layers.1.mlp.down_proj.weight",
    "vision tower": "model.vision_tower.visual.transformer.resblocks.1.mlp.c_fc.weight",
    "head": "lm_head.weight",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return write(tmp_path_factory.mktemp("adapter"), folder)


def write(path, base, **options):
    model = peft.get_peft_model(mllm.load(base, **options)[0], peft.LoraConfig(r=1, target_modules=["q_proj"]))
    model.save_pretrained(path)
    write_base_card(path, model, base)
    return path


def store(path, base, change=None, **options):
    model, processor = mllm.load(base, **options)
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_base_with_one_other_weight_is_another_and_the_part_is_named(folder, adapter, tmp_path, part):
    other = store(tmp_path, folder, lambda model: model.get_parameter(WEIGHTS[part]).add_(0.01))
    with pytest.raises(UserError, match=f"its {part} has other weights, such as {WEIGHTS[part]}"):
        mllm.load(other, adapter=adapter)


def test_a_base_whose_weights_have_all_moved_a_little_is_another(folder, adapter, tmp_path):
    other = store(tmp_path, folder, lambda model: [weight.mul_(1.001) for weight in model.parameters()])
    with pytest.raises(UserError, match="slightly other weights"):
        mllm.load(other, adapter=adapter)


@pytest.mark.parametrize("trained_in", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_stored_in_another_type_is_the_same(folder, tmp_path, trained_in):
    adapter = write(tmp_path / "adapter", folder, dtype=trained_in)
    for stored in (torch.float32, torch.float16, torch.bfloat16):
        mllm.load(store(tmp_path / "base", folder, dtype=stored), adapter=adapter)


def test_a_card_of_an_earlier_release_is_read_with_a_note(folder, tmp_path):
    write(tmp_path, folder)
    card = json.loads((tmp_path / "base.json").read_text())
    (tmp_path / "base.json").write_text(json.dumps({key: card[key] for key in card if key != "parts"}))
    with pytest.warns(UserWarning, match="earlier release"):
        mllm.load(folder, adapter=tmp_path)


def test_a_card_that_is_none_is_refused_by_name(folder, tmp_path):
    write(tmp_path, folder)
    (tmp_path / "base.json").write_text("{}")
    with pytest.raises(UserError, match=r"base\.json is no base card"):
        mllm.load(folder, adapter=tmp_path)


def test_the_card_of_a_model_in_memory_knows_what_peft_has_wrapped(tmp_path):
    model, _ = mllm.load(write_tiny_llava(tmp_path / "base"))
    bare, wrapped = tmp_path / "bare", tmp_path / "wrapped"
    write_base_card(bare, model, tmp_path / "base")
    del model.base_as_read  # as of a model that no folder was read for
    options = {"modules_to_save": ["embed_tokens", "multi_modal_projector"], "target_modules": ["q_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, **options))
    torch.nn.init.ones_(adapted.get_input_embeddings().weight)
    write_base_card(wrapped, adapted, tmp_path / "base")
    assert (bare / "base.json").read_text() == (wrapped / "base.json").read_text()


def test_samples_are_kept_as_they_were_while_a_base_in_bf16_is_trained(folder):
    model, _ = mllm.load(folder, dtype=torch.bfloat16)
    bias = WEIGHTS["projector"]
    before = model.base_as_read[1]["projector"][bias].clone()
    with torch.no_grad():
        model.get_parameter(bias).add_(1)
    assert torch.equal(model.base_as_read[1]["projector"][bias], before)
