"""What transformers and PEFT do with any adapter works with MOLE's, or is refused in words."""

import json
import shutil

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mllm.common.errors import UserError
from mllm.mole import MoleConfig
from tests.tiny import tiny_language_model

INPUT_IDS = torch.arange(4, 12)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/ and adapter/, whose experts do something."""
    path = tmp_path_factory.mktemp("doors")
    tiny_language_model().save_pretrained(path / "base")
    model = peft.get_peft_model(base(path), MoleConfig(r=2, task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(path / "adapter")
    return path


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


@torch.no_grad()
def logits(model):
    return model.eval()(INPUT_IDS).logits


def test_transformers_loads_an_adapter_as_peft_does(folder):
    expected = logits(peft.PeftModel.from_pretrained(base(folder), folder / "adapter"))
    added = base(folder)
    added.load_adapter(str(folder / "adapter"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / "adapter")), expected)
    assert torch.equal(logits(added), expected)
    assert not torch.equal(expected, logits(base(folder)))


def test_the_type_is_written_as_a_word_and_told_in_the_status(folder):
    model = peft.PeftModel.from_pretrained(base(folder), folder / "adapter")
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["peft_type"] == "MOLE"
    assert model.get_model_status().peft_types == {"default": "MOLE"}


def test_a_deleted_adapter_leaves_the_base_and_makes_room_for_another(folder):
    model = base(folder)
    model.add_adapter(MoleConfig(r=2), "x")
    model.delete_adapter("x")
    assert torch.equal(logits(model), logits(base(folder)))
    adapted = peft.get_peft_model(base(folder), MoleConfig(r=2))
    adapted.delete_adapter("default")
    assert torch.equal(logits(adapted.base_model.model), logits(base(folder)))
    adapted.add_adapter("y", MoleConfig(r=3))
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert names
    assert all(".y." in name for name in names)
    adapted.set_adapter("y")
    assert torch.equal(logits(adapted), logits(base(folder)))


def test_an_adapter_saved_under_any_name_is_read_under_any_other(folder, tmp_path):
    model = peft.PeftModel.from_pretrained(base(folder), folder / "adapter", adapter_name="first")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(folder), tmp_path / "first", adapter_name="second")
    assert torch.equal(logits(again), logits(model))


def test_routers_of_an_earlier_release_are_read(folder, tmp_path):
    shutil.copytree(folder / "adapter", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    old = {name.replace("mole_router.", "mole_router.default."): weight for name, weight in weights.items()}
    save_file(old, tmp_path / "adapter_model.safetensors")
    expected = logits(peft.PeftModel.from_pretrained(base(folder), folder / "adapter"))
    assert old.keys() != weights.keys()
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(folder), tmp_path)), expected)


def test_a_refused_second_adapter_leaves_no_trace(folder):
    model = base(folder)
    model.load_adapter(str(folder / "adapter"))
    expected = logits(model)
    with pytest.raises(UserError, match="one adapter a model"):
        model.add_adapter(MoleConfig(r=2), "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_what_mole_cannot_do_is_refused_in_words(folder):
    model = peft.PeftModel.from_pretrained(base(folder), folder / "adapter")
    with pytest.raises(UserError, match="adapter_names"):
        model(INPUT_IDS, adapter_names=["default"])
    with pytest.raises(ValueError, match="MOLE"):
        hotswap_adapter(model, str(folder / "adapter"), adapter_name="default")
    with pytest.raises(ValueError, match="MOLE"):
        peft.PeftMixedModel(base(folder), MoleConfig(r=2))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "target_modules: 'v_porj'.*nearest: v_proj"),
        ({"target_modules": r".*self_attn\.(q_proj|v_porj)"}, "target_modules: 'v_porj'"),
        ({"expert_modules": ["mlp", "mpl"]}, "expert_modules: 'mpl'.*nearest: mlp"),
        ({"modules_to_save": ["embed_tokn"]}, "modules_to_save: 'embed_tokn'.*nearest: embed_tokens"),
        ({"tpo_k": 1}, "no field 'tpo_k'.*nearest: top_k"),
    ],
    ids=str,
)
def test_a_name_that_matches_nothing_is_refused(folder, fields, told):
    with pytest.raises(UserError, match=told):
        peft.get_peft_model(base(folder), MoleConfig(**fields))


def test_an_unknown_field_of_a_saved_config_is_refused_by_peft_itself_too(folder, tmp_path):
    values = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"of_tomorrow": 1}))
    with pytest.raises(UserError, match="of_tomorrow"):
        peft.PeftConfig.from_pretrained(tmp_path)
