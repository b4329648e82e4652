"""What routing did over many forward passes: sums until somebody prints them.

L routed layers, T tokens, E experts, K picks, M = 2 modalities (text, image).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mllm.errors import UserError
from mllm.routing.context import RoutingContext

MODALITIES = ("text", "image")
ALL = "all"  # the domain of tokens whose domain nobody told


@dataclass
class _Sums:
    """Sums over the tokens of one domain, float64 on the CPU."""

    tokens_M: Tensor
    picks_LME: Tensor
    probs_LME: Tensor
    entropy_LM: Tensor

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class RoutingStats:
    """Picks, probabilities and entropies by layer × expert × modality × domain.

    Example: `stats.update(routing_context(model), domains)` after every forward, then `stats.all_reduce().summary()`.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self._sums: dict[str, _Sums] = {}

    @torch.no_grad()
    def update(self, context: RoutingContext, domains: Sequence[str] | None = None) -> None:
        """Add the last forward's routings. Padding does not count; every other token does.

        domains: one name for each row of the batch; without them everything counts under "all".
        Raises UserError when domains and rows differ in number, or the tokens' modality cannot be known.
        """
        if not context.routings:
            return
        domains = [ALL] * context.batch_size if domains is None else list(domains)
        if len(domains) != context.batch_size:
            raise UserError(
                f"{len(domains)} domains for a batch of {context.batch_size} rows; give one domain for each row (beam "
                "search multiplies rows: update during greedy decoding or prefill)."
            )
        if context.is_image_T is None:
            raise UserError(
                "The model was called with inputs_embeds, so image and text tokens cannot be told apart; call it with "
                "input_ids."
            )
        if self.layers not in ([], context.layers):
            raise UserError(
                f"These statistics hold the layers {self.layers}, the forward routed {context.layers}; use one "
                "RoutingStats a model."
            )
        self.layers = context.layers
        names = sorted(set(domains))
        for name, sums in zip(names, self._count(context, [names.index(domain) for domain in domains]), strict=True):
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _count(self, context: RoutingContext, domain_of_row: list[int]) -> list[_Sums]:
        """Sums of one forward for each domain: one index_add over (domain, modality) cells for all layers together."""
        probs_LTE = context.stack("router_probs_TX")
        num_layers, _, num_experts = probs_LTE.shape
        picks_LTE = F.one_hot(context.stack("expert_ids_TK"), num_experts).sum(2)
        entropy_LT1 = torch.special.entr(probs_LTE).sum(-1, keepdim=True)
        per_token_LTF = torch.cat([picks_LTE, probs_LTE, entropy_LT1, torch.ones_like(entropy_LT1)], dim=-1)
        per_token_LTF = per_token_LTF * ~context.is_pad_T[:, None]

        domain_B = torch.tensor(domain_of_row, device=probs_LTE.device)
        cell_T = domain_B[context.sample_T] * len(MODALITIES) + context.is_image_T
        num_domains = max(domain_of_row) + 1
        cells_LCF = per_token_LTF.new_zeros(num_layers, num_domains * len(MODALITIES), per_token_LTF.shape[-1])
        cells_LCF = cells_LCF.index_add(1, cell_T, per_token_LTF).double().cpu()
        cells_NLMF = cells_LCF.unflatten(1, (num_domains, len(MODALITIES))).transpose(0, 1)
        return [
            _Sums(
                tokens_M=cells_LMF[0, :, -1],
                picks_LME=cells_LMF[..., :num_experts],
                probs_LME=cells_LMF[..., num_experts : 2 * num_experts],
                entropy_LM=cells_LMF[..., -2],
            )
            for cells_LMF in cells_NLMF
        ]

    def merge(self, other: RoutingStats) -> RoutingStats:
        """A new RoutingStats with the sums of both."""
        merged = RoutingStats()
        merged.layers = self.layers or other.layers
        merged._sums = dict(self._sums)
        for name, sums in other._sums.items():
            merged._sums[name] = merged._sums[name] + sums if name in merged._sums else sums
        return merged

    def all_reduce(self) -> RoutingStats:
        """The sums of all ranks as a new RoutingStats; self is unchanged. All ranks must call it together."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.merge(RoutingStats())
        parts: list[RoutingStats] = [RoutingStats()] * dist.get_world_size()
        dist.all_gather_object(parts, self)
        total = RoutingStats()
        for part in parts:
            total = total.merge(part)
        return total

    def _total(self) -> _Sums | None:
        parts = list(self._sums.values())
        return sum(parts[1:], parts[0]) if parts else None

    def summary(self) -> dict[str, float]:
        """Flat figures for a log; empty before the first update.

        routing/entropy/<layer>       mean entropy of a token's probabilities in nats (ln E: the router does not care)
        routing/load/<layer>          mean experts a token
        routing/max_share/<layer>     share of picks of the busiest expert (1/E when even, 1 when collapsed)
        routing/dead_experts/<layer>  experts that took no token
        and the same without a layer: the mean over layers, for dead experts the sum.
        """
        total = self._total()
        if total is None:
            return {}
        tokens = total.tokens_M.sum().clamp(min=1)
        picks_LE = total.picks_LME.sum(1)
        shares_LE = picks_LE / picks_LE.sum(-1, keepdim=True).clamp(min=1)
        by_layer = {
            "entropy": total.entropy_LM.sum(-1) / tokens,
            "load": picks_LE.sum(-1) / tokens,
            "max_share": shares_LE.amax(-1),
            "dead_experts": (picks_LE == 0).sum(-1).double(),
        }
        figures = {
            f"routing/{name}": float(values_L.sum() if name == "dead_experts" else values_L.mean())
            for name, values_L in by_layer.items()
        }
        for name, values_L in by_layer.items():
            figures |= {f"routing/{name}/{layer}": float(v) for layer, v in zip(self.layers, values_L, strict=True)}
        return figures

    def shares(self) -> dict[str, dict[str, list[float]]]:
        """domain -> layer -> share of the domain's picks that each expert took."""
        return {name: self._by_layer(sums.picks_LME.sum(1)) for name, sums in sorted(self._sums.items())}

    def _by_layer(self, picks_LE: Tensor) -> dict[str, list[float]]:
        shares_LE = picks_LE / picks_LE.sum(-1, keepdim=True).clamp(min=1)
        return dict(zip(self.layers, shares_LE.tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values: summary, shares by domain, shares by modality, and per domain and modality the
        tokens, picks [layer][expert], mean probabilities [layer][expert] and mean entropies [layer]."""
        total = self._total()
        return {
            "layers": self.layers,
            "summary": self.summary(),
            "shares": self.shares(),
            "modality_shares": {}
            if total is None
            else {
                name: self._by_layer(total.picks_LME[:, m])
                for m, name in enumerate(MODALITIES)
                if total.tokens_M[m] > 0
            },
            "domains": {name: _cells(sums) for name, sums in sorted(self._sums.items())},
        }


def _cells(sums: _Sums) -> dict[str, Any]:
    return {
        modality: {
            "tokens": int(sums.tokens_M[m]),
            "picks": sums.picks_LME[:, m].tolist(),
            "mean_probs": (sums.probs_LME[:, m] / sums.tokens_M[m].clamp(min=1)).tolist(),
            "entropy": (sums.entropy_LM[:, m] / sums.tokens_M[m].clamp(min=1)).tolist(),
        }
        for m, modality in enumerate(MODALITIES)
    }
