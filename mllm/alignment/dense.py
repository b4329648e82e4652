"""A gradient for the experts that were not picked: straight-through, the forward left as it is (DenseMixer's idea).

    w_e = sg(w_e) + p_e - sg(p_e)     for every real expert e, w_e = 0 where it was not picked

So every expert runs, but the output is that of the picked ones; a router's gradient then knows what the others would
have added. Costs the forward of all experts, in training only.

T tokens, D width, E real experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from mllm.alignment.routes import RoutedLayer, decoder_layers
from mllm.common.errors import UserError
from mllm.mole import MoleLinear
from mllm.mole.native_moe import NullRouter
from mllm.routing import Routing, routing_context


@dataclass(frozen=True)
class DenseRouting(Routing):
    """A Routing whose weights have the gradient of all probabilities."""

    @cached_property
    def weights_TE(self) -> Tensor:
        sparse_TE = torch.zeros_like(self.router_probs_TX).scatter(1, self.expert_ids_TK, self.expert_weights_TK)
        return straight_through(sparse_TE[:, : self.num_experts], self.router_probs_TX[:, : self.num_experts])


def straight_through(weights_TE: Tensor, probs_TE: Tensor) -> Tensor:
    """The weights, bit for bit, with the gradient of the probabilities."""
    return weights_TE.detach() + (probs_TE - probs_TE.detach())


@contextmanager
def dense_gradient(model: nn.Module, layers: Sequence[RoutedLayer]) -> Iterator[None]:
    """While this lasts, the routers of these layers get dense gradients.

    Raises UserError for experts computed by sorting in MOLE, which never run those that were not picked.
    """
    for module in model.modules():
        if isinstance(module, MoleLinear) and any(experts.is_sorted for experts in module.mole_experts.values()):
            raise UserError("A dense gradient needs all experts to run: use an adapter with expert_path: masked.")
    with ExitStack() as hooks:
        for layer in layers:
            if isinstance(layer.router, NullRouter):
                block = decoder_layers(model)[layer.depth].mlp
                hook = block.experts.register_forward_hook(partial(_add_dense, model, layer))
            else:
                hook = layer.router.register_forward_hook(_dense)
            hooks.callback(hook.remove)
        yield


def _dense(_: nn.Module, __: tuple, routing: Routing) -> DenseRouting:
    return DenseRouting(**{field.name: getattr(routing, field.name) for field in fields(Routing)})


def _add_dense(
    model: nn.Module, layer: RoutedLayer, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor], output_TD: Tensor
) -> Tensor:
    """Of a native block: the experts run twice more, and only gradients are kept: that of all probabilities is added,
    that of the picks' weights taken away."""
    hidden_TD, ids_TK = (arg.detach() for arg in args[:2])
    router, weights_TK = layer.router, args[2]
    probs_TE = routing_context(model).routings[layer.name].router_probs_TX[:, : router.num_experts] * router.scaling
    ids_TE = torch.arange(router.num_experts, device=ids_TK.device).expand(len(ids_TK), -1)
    dense_TD = experts.forward(hidden_TD, ids_TE, probs_TE.to(weights_TK.dtype))  # forward: no hook runs again
    sparse_TD = experts.forward(hidden_TD, ids_TK, weights_TK)
    return output_TD + (dense_TD - dense_TD.detach()) - (sparse_TD - sparse_TD.detach())
