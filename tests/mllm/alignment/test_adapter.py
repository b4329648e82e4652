"""A folder of routers alone, put on top of what they were aligned in."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mllm.alignment import Aligner, AlignSettings, load_router_adapter, prepare, save_router_adapter
from mllm.common.errors import UserError
from tests.mllm.alignment.helpers import MOLES, NATIVES, tiny, tiny_mole
from tests.mllm.mole.test_native_moe import INPUT_IDS, tiny_moe


def moved(model, **settings) -> Aligner:
    """As after training: every trained weight is another one."""
    aligner = Aligner(model, AlignSettings(**{"layers": 1} | settings))
    with torch.no_grad():
        for parameter in aligner.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return aligner


@pytest.mark.parametrize("kind", [*MOLES, *NATIVES])
def test_a_fresh_model_with_the_routers_on_top_is_the_aligned_one(kind, tmp_path):
    aligner = moved(tiny(kind))
    save_router_adapter(tmp_path / "routers", aligner)
    fresh = tiny_moe(kind) if kind in NATIVES else tiny(kind)
    with torch.no_grad():
        before = fresh(INPUT_IDS).logits
        layers = load_router_adapter(fresh, tmp_path / "routers")
        assert torch.equal(fresh(INPUT_IDS).logits, aligner.model(INPUT_IDS).logits)
        assert not torch.equal(fresh(INPUT_IDS).logits, before)
    assert [layer.name for layer in layers] == aligner.names
    assert sum(p.numel() for p in fresh.parameters()) == sum(p.numel() for p in aligner.model.parameters())


def test_the_folder_holds_router_weights_only(tmp_path):
    aligner = moved(tiny_mole())
    save_router_adapter(tmp_path / "routers", aligner, base="miniworld", adapter="runs/mole/adapter")
    assert load_file(tmp_path / "routers" / "router_adapter.safetensors").keys() == aligner.trained().keys()
    card = json.loads((tmp_path / "routers" / "router_adapter.json").read_text())
    assert card["layers"] == {"layers.2.mlp": 2}
    assert card["base"] == "miniworld"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_mole(num_experts=4), "weight is of shape .3, 16., the model's of .4, 16."),
        (lambda: moved(tiny_mole()).model, "layers.2.mlp.weight was aligned from other weights"),
        (lambda: tiny_mole(router_input="linear"), "holds a router of layers.2.mlp, but"),
        (lambda: tiny_mole(modality_prior=True), "lacking layers.2.mlp.prior"),
        (lambda: prepare(tiny_moe("olmoe", num_hidden_layers=3)), "of a MOLE adapter, the model's are of a native"),
    ],
    ids=["experts", "weights", "layers", "prior", "kind"],
)
def test_routers_of_another_model_are_refused_by_name_and_change_nothing(other, message, tmp_path):
    save_router_adapter(tmp_path / "routers", moved(tiny_mole()), base="miniworld", adapter="runs/x/adapter")
    model = other()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=message):
        load_router_adapter(model, tmp_path / "routers")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_folder_without_routers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"router_adapter\.json"):
        load_router_adapter(tiny_mole(), tmp_path)
