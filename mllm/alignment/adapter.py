"""A folder that holds aligned routers and nothing else, to be put on top of the model they were aligned in.

The routers take the place of those that are there, so inference costs what it did.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mllm.alignment.align import Aligner
from mllm.alignment.routes import RoutedLayer, prepare, routed_layers
from mllm.bases.identity import weight_digest
from mllm.common.errors import UserError
from mllm.mole.native_moe import NullRouter

CARD, WEIGHTS = "router_adapter.json", "router_adapter.safetensors"


def save_router_adapter(folder: str | Path, aligner: Aligner, *, base: str = "", adapter: str = "") -> Path:
    """Writes the aligned routers and what they were aligned from; the folder appears whole or not at all.

    Args:
        base, adapter: names for messages: the base model, and the MOLE adapter on it, if any.
    """
    folder = Path(folder)
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({name: weight.contiguous() for name, weight in aligner.weights().items()}, draft / WEIGHTS)
    card = {
        "kind": _kind(aligner.layers[0]),
        "base": base,
        "adapter": adapter,
        "layers": {layer.name: layer.depth for layer in aligner.layers},
        "aligned_from": {name: weight_digest(weight) for name, weight in aligner.initial.items()},
        "settings": asdict(aligner.settings),
    }
    (draft / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(draft, folder)
    return folder


def load_router_adapter(model: nn.Module, folder: str | Path) -> list[RoutedLayer]:
    """Puts aligned routers into the model they were aligned in. Returns the layers.

    Raises:
        UserError: the folder holds none, or the model's routers are others than those that were aligned; each is
            named, and the model is left as it was.
    """
    folder = Path(folder)
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; expected a folder written by save_router_adapter.")
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read as save_router_adapter wrote it: {error}") from error
    lacking = [key for key in ("kind", "base", "adapter", "layers", "aligned_from") if key not in card]
    if lacking or card["aligned_from"].keys() != weights.keys():
        raise UserError(
            f"{folder}: {CARD} and {WEIGHTS} do not belong together ({', '.join(lacking) or 'other names in each'})."
            " Take the folder as save_router_adapter wrote it."
        )
    layers = routed_layers(prepare(model), tuple(sorted(set(_known_depths(model, card, folder)))))
    layers = [layer for layer in layers if layer.name in card["layers"]]
    there = {f"{layer.name}.{name}": p for layer in layers for name, p in layer.parameters().items()}
    _check_same(folder, card, layers, there, weights)
    with torch.no_grad():
        for name, parameter in there.items():
            parameter.copy_(weights[name])
    return layers


def _known_depths(model: nn.Module, card: Mapping, folder: Path) -> list[int]:
    found = {layer.name: layer.depth for layer in routed_layers(model, 10**9)}
    missing = [name for name in card["layers"] if name not in found]
    if missing:
        raise UserError(
            f"{folder} holds a router of {missing[0]}, but the model has none there ({', '.join(found)}). Load it on "
            f"{_origin(card)}."
        )
    return [found[name] for name in card["layers"]]


def _check_same(
    folder: Path, card: Mapping, layers: list[RoutedLayer], there: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    if card["kind"] != _kind(layers[0]):
        raise UserError(f"{folder} holds routers of {card['kind']}, the model's are of {_kind(layers[0])}.")
    if there.keys() != weights.keys():
        left, lacks = sorted(weights.keys() - there.keys())[:3], sorted(there.keys() - weights.keys())[:3]
        raise UserError(
            f"{folder} does not hold the weights of the model's routers: left over {', '.join(left) or 'none'}, "
            f"lacking {', '.join(lacks) or 'none'}. Load it on {_origin(card)}."
        )
    for name, parameter in there.items():
        if parameter.shape != weights[name].shape:
            raise UserError(
                f"{folder}: {name} is of shape {list(weights[name].shape)}, the model's of {list(parameter.shape)}. "
                f"Load it on {_origin(card)}."
            )
        if weight_digest(parameter) != card["aligned_from"][name]:
            raise UserError(
                f"{folder}: {name} was aligned from other weights than the model's. Load it on {_origin(card)}, as it "
                "was before alignment."
            )


def _origin(card: Mapping) -> str:
    named = [f"the adapter {card['adapter']}"] * bool(card["adapter"]) + [f"the base {card['base']}"] * bool(
        card["base"]
    )
    return " on ".join(named) or "what it was aligned on"


def _kind(layer: RoutedLayer) -> str:
    return "a native mixture of experts" if isinstance(layer.router, NullRouter) else "a MOLE adapter"
