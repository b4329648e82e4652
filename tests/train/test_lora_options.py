"""Every option of LoRA that the installed PEFT offers: a saved adapter is the one that was trained, or it is refused.

The values are read from PEFT's own types, so that a new one is tried unasked.
"""

import shutil
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from peft import LoraConfig

import mllm
from mllm.common.errors import UserError
from tests.train.data import write_config
from train.config import load_config
from train.parts import LORA_FIELDS, build_model, gather_adapter, make_adapter, trained, write_adapter
from train.run import base_card

FIELDS = {field.name: field for field in fields(LoraConfig)}


def literals(name: str) -> list[Any]:
    """The values that a field's annotation spells out."""
    hint = LoraConfig.__dataclass_fields__[name].type
    hint = eval(hint, vars(__import__("peft.tuners.lora.config", fromlist=["x"]))) if isinstance(hint, str) else hint

    def inside(hint: Any) -> list[Any]:
        if get_origin(hint) is Literal:
            return list(get_args(hint))
        if hint is bool:
            return [True, False]
        return [value for part in get_args(hint) for value in inside(part)]

    return inside(hint)


STARTS = [start.replace("[number of iters]", "4") if isinstance(start, str) else start
          for start in [*literals("init_lora_weights"), "lora_ga", "of_tomorrow"]]  # fmt: skip
OPTIONS = [
    *({"init_lora_weights": start} for start in STARTS),
    *({"bias": value} for value in literals("bias")),
    *({name: True} for name, field in FIELDS.items() if field.type in (bool, "bool") and name != "inference_mode"),
    {"modules_to_save": ["multi_modal_projector", "embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["vision_tower"]},
    {"modules_to_save": ["input_layernorm"]},
    {"trainable_token_indices": [5, 6]},
    {"trainable_token_indices": {"embed_tokens": [5]}},
    {"rank_pattern": {"q_proj": 3}},
    {"alpha_pattern": {r".*layers\.1.*v_proj": 3}},
    {"rank_pattern": {"q_proj": 3}, "use_rslora": True},
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"exclude_modules": ["v_proj"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": r".*language_model.*(q_proj|down_proj)"},
    {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
    {"layer_replication": [[0, 2], [1, 2]]},
    {"use_dora": True, "init_lora_weights": "gaussian"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("options")
    write_config(path)
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The same base whose head is its embedding."""
    path = tmp_path_factory.mktemp("tied")
    config = write_config(path)
    base = load_config(config).model.path
    model, processor = mllm.load(base)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    processor.save_pretrained(base)
    return path


def logits(model) -> torch.Tensor:
    torch.manual_seed(0)
    image_id = model.config.image_token_id
    ids = torch.tensor([[5, *[image_id] * 9, 6, 7, 8]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=torch.randn(1, 3, 24, 24)).logits


def come_back(folder, name: str, adapter: dict[str, Any]) -> float | None:
    """Largest difference of logits between the model that was trained and what was saved; None where it is refused."""
    config = load_config(folder / "config.yaml", ["model.dtype=fp32"])
    config.model.adapter = {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"], **adapter}
    try:
        model, processor = build_model(config)
    except UserError as error:
        refusal = str(error)
        print(refusal)
        return None if next(iter(adapter)) in refusal else float("inf")
    card = base_card(model, config.model.path, processor)
    with torch.no_grad():
        for _, weight in trained(model):  # stands for some steps
            weight.add_(0.05 * torch.randn_like(weight))
    shutil.rmtree(folder / name, ignore_errors=True)
    write_adapter(folder / name, model, gather_adapter(model), base_card=card)
    again, _ = mllm.load(config.model.path, adapter=folder / name, dtype=torch.float32)
    second, _ = build_model(
        load_config(
            folder / "config.yaml", ["model.dtype=fp32", "model.adapter=null", f"model.start_from={folder / name}"]
        )
    )
    expected = logits(model)
    assert not torch.equal(expected, logits(mllm.load(config.model.path, dtype=torch.float32)[0]))
    assert {name for name, _ in trained(second)} == {name for name, _ in trained(model)}
    return max(float((logits(each) - expected).abs().max()) for each in (again, second))


@pytest.mark.parametrize("adapter", OPTIONS, ids=str)
def test_a_saved_lora_is_the_one_that_was_trained_or_is_refused_by_name(folder, adapter):
    assert come_back(folder, "adapter", adapter) in (None, 0)


@pytest.mark.parametrize(
    "adapter",
    [
        {"trainable_token_indices": [5]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_a_saved_lora_on_a_tied_embedding_is_the_one_that_was_trained_or_is_refused_by_name(tied, adapter):
    assert come_back(tied, "adapter", adapter) in (None, 0)


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - LORA_FIELDS))
def test_an_option_of_lora_that_was_not_tried_is_refused_by_name(name):
    if name in ("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"):
        return
    with pytest.raises(UserError, match=name):
        make_adapter({"type": "lora", name: "something else"}, "model.adapter")
