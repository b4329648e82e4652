"""Routers of a model, whatever kind they are, and the routing vector r of a sample (RoMA, 2511.07419).

B batch, S sequence, T = B·S tokens, X experts of a layer, null experts included, R = X summed over the chosen layers.
MOLE adapters and native mixtures of experts leave the same `Routing` in a `RoutingContext`, so one way serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from mllm.common.errors import UserError
from mllm.data.template import IGNORED
from mllm.mole import MoleLayer, native_moe
from mllm.routing import Routing, RoutingContext, routing_context

TOKENS = ("last", "first", "middle", "last3", "mean")
SPACES = ("probs", "logits")


@dataclass(frozen=True)
class RoutedLayer:
    """One router: its name in the RoutingContext, the decoder layer it stands in, and its module."""

    name: str
    depth: int
    router: nn.Module

    def parameters(self) -> dict[str, nn.Parameter]:
        """What of the router learns, by short name: `weight`, and `bias`, `prior`, `null_weight` where there are."""
        owner = getattr(self.router, "router", self.router)  # a TokenRouter holds the module with the weights
        return dict(owner.named_parameters())


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face model itself, its adapters inside."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of the language model."""
    decoder = unwrapped(model).get_decoder()
    return next(child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child))


def prepare(model: nn.Module) -> nn.Module:
    """Makes a native mixture of experts record its routing; it stays bit for bit what it was. Others are left alone.

    Raises UserError for a model that has no routers at all.
    """
    if routing_context(model) is None:
        native_moe.add_null_experts(model, num_null_experts=0)
    return model


def routed_layers(model: nn.Module, layers: int | Sequence[int] = 5) -> list[RoutedLayer]:
    """The routers of some decoder layers, in running order.

    Args:
        layers: the last so many of the decoder layers that have routers (all, where they are fewer), or the numbers
            of decoder layers, counted from 0.

    Raises:
        UserError: no routers that learn, or a layer that has none.
    """
    found = [
        routed
        for depth, layer in enumerate(decoder_layers(model))
        for module in layer.modules()
        if (routed := _routed(module, depth)) is not None
    ]
    if not found:
        raise UserError(
            f"{type(unwrapped(model)).__name__} has no routers to align: expected a MOLE adapter, or a native mixture "
            "of experts that went through mllm.alignment.prepare."
        )
    if not all(routed.parameters() for routed in found):
        raise UserError("The routers decide by rule or are frozen at random, so there is nothing in them to align.")
    depths = sorted({routed.depth for routed in found})
    wanted = depths[-layers:] if isinstance(layers, int) else sorted(layers)
    if not wanted or not set(wanted) <= set(depths) or (isinstance(layers, int) and layers < 1):
        raise UserError(f"layers={layers}: choose at least one of the decoder layers with routers, {depths}.")
    return [routed for routed in found if routed.depth in wanted]


def _routed(module: nn.Module, depth: int) -> RoutedLayer | None:
    if isinstance(module, MoleLayer) and module.layer is not None:
        return RoutedLayer(module.layer, depth, module.mole_router[module.active_adapters[0]])
    return RoutedLayer(module.layer, depth, module) if isinstance(module, native_moe.NullRouter) else None


def freeze_all_but(model: nn.Module, layers: Sequence[RoutedLayer]) -> list[nn.Parameter]:
    """Freezes the model but for these routers, whose weights become fp32. Returns them."""
    model.requires_grad_(False)
    trained = [parameter for layer in layers for parameter in layer.parameters().values()]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return trained


# -- which token, which vector -----------------------------------------------------------------------------------------


def prompt_mask(labels_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """bool [B, S] the real tokens before the last answer; all real ones in a row that has no answer.

    By labels and mask alone, so padding may stand on either side.
    """
    supervised_BS = labels_BS != IGNORED
    before_BS = torch.cat([torch.zeros_like(supervised_BS[:, :1]), supervised_BS[:, :-1]], dim=1)
    starts_BS = supervised_BS & ~before_BS
    places_S = torch.arange(labels_BS.shape[1], device=labels_BS.device)
    last_start_B1 = torch.where(starts_BS, places_S, -1).max(1, keepdim=True).values
    end_B1 = last_start_B1.masked_fill(last_start_B1 < 0, labels_BS.shape[1])
    return attention_mask_BS.bool() & (places_S < end_B1)


def chosen_tokens(labels_BS: Tensor, attention_mask_BS: Tensor, token: str = "last") -> Tensor:
    """fp32 [B, S] how much each token counts in r; rows sum to 1.

    token: of the prompt's real tokens, "last" (the paper's choice: the one that predicts the answer), "first",
        "middle", "last3", or "mean" of all.

    Raises UserError for a name that is none of these.
    """
    if token not in TOKENS:
        raise UserError(f"token={token!r} is not known; choose one of {', '.join(TOKENS)}.")
    prompt_BS = prompt_mask(labels_BS, attention_mask_BS)
    place_BS, length_B1 = prompt_BS.cumsum(1) - 1, prompt_BS.sum(1, keepdim=True)
    chosen_BS = {
        "last": place_BS == length_B1 - 1,
        "first": place_BS == 0,
        "middle": place_BS == length_B1 // 2,
        "last3": place_BS >= length_B1 - 3,
        "mean": prompt_BS,
    }[token]
    chosen_BS = (chosen_BS & prompt_BS).float()
    return chosen_BS / chosen_BS.sum(1, keepdim=True).clamp(min=1)


def routing_vectors(
    context: RoutingContext, layers: Sequence[str], weights_BS: Tensor, *, space: str = "probs"
) -> Tensor:
    """r [B, R], fp32: of each row, the routers' full softmax at the chosen token, layer after layer.

    space: "probs", or "logits", centred over the experts that the token may take and 0 for the others.
    """
    parts = [
        _field_TX(context.routings[name], space).to(weights_BS.device).unflatten(0, weights_BS.shape) for name in layers
    ]
    return torch.cat([torch.einsum("bs,bsx->bx", weights_BS, part_BSX) for part_BSX in parts], dim=1)


def _field_TX(routing: Routing, space: str) -> Tensor:
    if space == "probs":
        return routing.router_probs_TX
    logits_TX = routing.router_logits_TX
    allowed_TX = logits_TX.isfinite()
    filled_TX = logits_TX.masked_fill(~allowed_TX, 0)
    mean_T1 = filled_TX.sum(1, keepdim=True) / allowed_TX.sum(1, keepdim=True)
    return (filled_TX - mean_T1).masked_fill(~allowed_TX, 0)
