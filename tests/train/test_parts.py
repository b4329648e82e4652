"""What is trained, in which part, at which rate; and the folder it is saved to."""

import json

import peft
import pytest
import torch

import mllm
from mllm.common.errors import UserError
from mllm.mole.start import Start
from tests.tiny import write_tiny_llava
from tests.train.data import write_config
from train.config import ModelSection, OptimSection, load_config
from train.parts import (
    adapter_config,
    build_model,
    gather_adapter,
    parameter_groups,
    part_of,
    router_rate_after,
    trained,
    write_adapter,
)
from train.run import base_card


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts")
    write_config(path)
    return path


def load(folder, *overrides: str):
    return load_config(folder / "config.yaml", list(overrides))


@pytest.mark.parametrize(
    ("adapter", "parts"),
    [("mole", {"projector", "attention", "experts", "router"}), ("lora", {"projector", "attention", "experts"})],
)
def test_every_trained_weight_is_in_one_part_and_one_group(folder, adapter, parts):
    config = load(folder, f"model.adapter={{type: {adapter}, r: 2}}")
    model, _ = build_model(config)
    grouped = [id(parameter) for group in parameter_groups(model, config.optim) for parameter in group["params"]]
    assert {part_of(name) for name, _ in trained(model)} == parts
    assert sorted(grouped) == sorted(id(parameter) for _, parameter in trained(model))


def test_a_part_takes_its_own_rate_and_biases_are_not_decayed(folder):
    config = load(folder, "optim.part_lr.router=5e-4", "optim.weight_decay=0.1")
    groups = parameter_groups(build_model(config)[0], config.optim)
    assert {group["lr"] for group in groups if group["part"] == "router"} == {5e-4}
    assert {group["lr"] for group in groups if group["part"] != "router"} == {1e-2}
    for group in groups:
        assert {parameter.dim() >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.1}


def test_how_special_tokens_in_text_are_read_is_noted_for_the_adapter(folder):
    config = load(folder, "data.special_tokens_in_text=tokens")
    model, processor = build_model(config)
    assert json.loads(base_card(model, config.model.path, processor))["special_tokens_in_text"] == "tokens"


def test_trained_weights_are_fp32_and_the_frozen_base_is_in_the_dtype_asked_for(folder):
    model, _ = build_model(load(folder, "model.dtype=bf16"))
    assert {parameter.dtype for _, parameter in trained(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_plain_lora_adapts_the_linears_that_mole_adapts_and_none_of_the_tower(folder):
    def adapted(kind: str) -> set[str]:
        model, _ = build_model(load(folder, f"model.adapter={{type: {kind}, r: 2}}"))
        bases = {
            name.split(".base_layer.weight")[0] for name, _ in model.named_parameters() if ".base_layer.weight" in name
        }
        return {name.replace(".base_layer", "") for name in bases}

    assert adapted("lora") == adapted("mole")
    assert all("language_model" in name for name in adapted("lora"))


def test_stage_align_trains_the_projector_alone(folder):
    model, _ = build_model(load(folder, "stage=projector", "model.adapter=null"))
    assert {part_of(name) for name, _ in trained(model)} == {"projector"}


def test_the_projector_stays_frozen_if_asked_to(folder):
    model, _ = build_model(load(folder, "model.train_projector=false"))
    assert "projector" not in {part_of(name) for name, _ in trained(model)}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"r": 4}, "model.adapter.type is None"),
        ({"type": "moel"}, "did you mean mole"),
        ({"type": "mole", "num_expert": 4}, "unknown key model.adapter.num_expert .did you mean num_experts"),
        ({"type": "lora", "lora_alfa": 4}, "did you mean lora_alpha"),
        ({"type": "mole", "top_k": 9}, "top_k"),
    ],
)
def test_a_wrong_adapter_section_is_refused_by_key(adapter, message):
    with pytest.raises(UserError, match=message):
        adapter_config(ModelSection(path="base", adapter=adapter))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.language_model.embed_tokens.modules_to_save.default.weight", "embeddings"),
        ("model.language_model.embed_tokens.lora_embedding_A.default", "embeddings"),
        ("lm_head.lora_A.default.weight", "embeddings"),
        ("model.vision_tower.visual.transformer.resblocks.0.attn.in_proj_weight", "tower"),
        ("model.multi_modal_projector.linear_1.lora_A.default.weight", "projector"),
        ("model.language_model.layers.0.post_attention_layernorm.modules_to_save.default.weight", "other"),
        ("model.language_model.layers.0.self_attn.q_norm.weight", "attention"),
        ("model.language_model.layers.0.mlp.up_proj.base_layer.bias", "other"),
        ("model.language_model.layers.0.mlp.gate_proj.lora_A.default.weight", "experts"),
        ("model.language_model.h.0.attention.dense.lora_A.default.weight", "attention"),
        ("model.language_model.layers.0.mlp.mole_router.default.router.weight", "router"),
    ],
)
def test_a_part_is_told_by_the_module_that_holds_a_weight(name, part):
    assert part_of(f"base_model.model.{name}") == part


def test_what_llava_never_reads_of_a_trained_tower_is_frozen_and_saved_all_the_same(folder, tmp_path):
    adapter = "{type: lora, r: 2, modules_to_save: [multi_modal_projector, vision_tower]}"
    config = load(folder, f"model.adapter={adapter}")
    model, processor = build_model(config)
    tower = {name for name, _ in trained(model) if part_of(name) == "tower"}
    assert any("resblocks.0" in name for name in tower)
    assert not any("resblocks.1" in name or "ln_post" in name for name in tower)
    card = base_card(model, config.model.path, processor)
    write_adapter(tmp_path / "adapter", model, gather_adapter(model), base_card=card)
    mllm.load(config.model.path, adapter=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"target_modules": "all-linear"}, "never called.*out_proj"),
        ({"target_modules": ["q_proj", "v_porj"]}, "target_modules: 'v_porj'.*nearest: v_proj"),
        ({"target_modules": r".*self_attn\.(q_proj|v_porj)"}, "target_modules: 'v_porj'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokn"]}, "modules_to_save.*nearest: embed_tokens"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["o_porj"]}, "exclude_modules: 'o_porj'.*nearest: o_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, "layers_to_transform: there is no layer 7"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layrs"},
            "layers_pattern: 'layrs'.*nearest: layers",
        ),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 3}}, "rank_pattern: 'k_proj'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"q_porj": 3}}, "alpha_pattern: 'q_porj'.*nearest: q_proj"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [999]}, "trainable_token_indices: 999 is no token"),
        ({"target_modules": [], "target_parameters": ["q_proj.weigth"]}, "target_parameters.*nearest: q_proj.weight"),
    ],
    ids=str,
)
def test_what_matches_nothing_or_never_learns_is_refused_by_name(folder, adapter, told):
    config = load(folder)
    config.model.adapter = {"type": "lora", "r": 2} | adapter
    with pytest.raises(UserError, match=told):
        build_model(config)


def test_a_start_that_changes_frozen_weights_is_refused_even_where_its_name_is_known(folder, monkeypatch):
    monkeypatch.setattr("train.parts.LORA_STARTS", (True, "olora"))
    config = load(folder)
    config.model.adapter = {"type": "lora", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": "olora"}
    with pytest.raises(UserError, match=r"olora.*changes 2 frozen weights"):
        build_model(config)


@pytest.mark.parametrize(
    "more", ["modules_to_save: [multi_modal_projector, embed_tokens]", "trainable_token_indices: [5]", "bias: all"]
)
def test_a_second_stage_loads_on_the_base_of_the_first(folder, tmp_path, more):
    config, start = load(folder, f"model.adapter={{type: lora, r: 2, {more}}}"), tmp_path / "first"
    for name in ("first", "second"):
        model, processor = build_model(config)
        card = base_card(model, config.model.path, processor)
        with torch.no_grad():
            for _, weight in trained(model):
                weight.add_(0.01)
        write_adapter(tmp_path / name, model, gather_adapter(model), base_card=card)
        config = load(folder, "model.adapter=null", f"model.start_from={start}")
    mllm.load(config.model.path, adapter=tmp_path / "second")


def test_a_saved_adapter_loads_with_the_trained_values(folder, tmp_path):
    config = load(folder)
    model, processor = build_model(config)
    for _, parameter in trained(model):
        torch.nn.init.normal_(parameter, std=0.1)
    write_adapter(
        tmp_path / "adapter", model, gather_adapter(model), base_card=base_card(model, config.model.path, processor)
    )
    loaded, _ = mllm.load(config.model.path, adapter=tmp_path / "adapter")
    assert isinstance(loaded, peft.PeftModel)
    values = dict(loaded.named_parameters())
    assert all(torch.equal(values[name], parameter) for name, parameter in trained(model))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("routing", ["router: frozen_random, balance: none", "balance: bias", "router_input: linear"])
def test_a_saved_adapter_routes_as_the_model_it_was_saved_from(folder, tmp_path, routing):
    """Also where the router is not trained, or chooses with a bias that no gradient moves."""
    config = load(folder, f"model.adapter={{type: mole, r: 4, num_experts: 3, {routing}}}")
    torch.manual_seed(1)  # not the seed of a model that is made while loading
    model, processor = build_model(config)
    for name, tensor in (*trained(model), *model.named_buffers()):
        if "mole_" in name and not name.endswith("allowed_PX"):
            torch.nn.init.normal_(tensor, std=0.5)
    card = base_card(model, config.model.path, processor)
    write_adapter(tmp_path / "adapter", model, gather_adapter(model), base_card=card)
    torch.manual_seed(2)
    loaded, _ = mllm.load(config.model.path, adapter=tmp_path / "adapter")
    input_ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected, got = (one.eval()(input_ids=input_ids).logits for one in (model, loaded))
        without = loaded.get_base_model().eval()
        with loaded.disable_adapter():
            base = without(input_ids=input_ids).logits
    assert torch.equal(got, expected)
    assert not torch.equal(got, base)


def test_an_aligned_projector_that_is_not_trained_on_goes_along_with_the_adapter(folder, tmp_path):
    align = load(folder, "stage=projector", "model.adapter=null")
    model, processor = build_model(align)
    card = base_card(model, align.model.path, processor)
    for _, parameter in trained(model):
        torch.nn.init.constant_(parameter, 0.5)
    write_adapter(tmp_path / "align", model, gather_adapter(model), base_card=card)

    config = load(folder, f"model.start_from={tmp_path / 'align'}", "model.train_projector=false")
    model, _ = build_model(config)
    write_adapter(tmp_path / "tuned", model, gather_adapter(model), base_card=card, start_from=config.model.start_from)
    loaded, _ = mllm.load(config.model.path, adapter=tmp_path / "tuned")
    assert all((value == 0.5).all() for name, value in loaded.named_parameters() if "multi_modal_projector" in name)


def test_a_whole_adapter_to_start_from_keeps_its_settings_and_goes_on_training(folder, tmp_path):
    config = load(folder)
    model, processor = build_model(config)
    card = base_card(model, config.model.path, processor)
    write_adapter(tmp_path / "first", model, gather_adapter(model), base_card=card)
    second = load(folder, "model.adapter=null", f"model.start_from={tmp_path / 'first'}")
    assert {name for name, _ in trained(build_model(second)[0])} == {name for name, _ in trained(model)}
    with pytest.raises(UserError, match=r"drop model\.adapter"):
        build_model(load(folder, f"model.start_from={tmp_path / 'first'}"))


def test_an_adapter_for_another_base_is_refused_with_both_names(folder, tmp_path):
    config = load(folder)
    model, processor = build_model(config)
    card = base_card(model, config.model.path, processor)
    write_adapter(tmp_path / "adapter", model, gather_adapter(model), base_card=card)
    other = write_tiny_llava(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=f"{config.model.path}.*other"):
        build_model(
            load(folder, f"model.path={other}", "model.adapter=null", f"model.start_from={tmp_path / 'adapter'}")
        )


@pytest.mark.parametrize(("start", "rate"), [(Start(0.9, True), 1e-3), (Start(0.4, False), None), (None, 1e-3)])
def test_routers_that_pictures_could_not_set_learn_as_fast_as_all_else(start, rate):
    optim = OptimSection(lr=1e-2, part_lr={"router": 1e-3})
    assert router_rate_after(optim, start).part_lr.router == rate
    assert optim.part_lr.router == 1e-3


@pytest.mark.parametrize("kind", ["mole", "lora"])
@pytest.mark.parametrize("trains", [True, False])
def test_other_modules_trained_in_full_do_not_drop_the_projector(folder, kind, trains):
    adapter = f"{{type: {kind}, r: 2, modules_to_save: [embed_tokens]}}"
    settings = [f"model.adapter={adapter}", f"model.train_projector={str(trains).lower()}"]
    model, _ = build_model(load_config(folder / "config.yaml", settings))
    parts = {part_of(name) for name, _ in trained(model)}
    assert ("projector" in parts, "embeddings" in parts) == (trains, True)
