"""What is trained, in which part, at which rate; and the folder it is saved to."""

import peft
import pytest
import torch

import mllm
from mllm.errors import UserError
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
    model, _ = build_model(load(folder, "stage=align", "model.adapter=null"))
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
    align = load(folder, "stage=align", "model.adapter=null")
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
