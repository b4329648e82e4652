"""Warnings a person needs about routing: routers that cannot learn, experts that nobody takes, collapse.

E real experts, L routed layers, M = 2 modalities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mllm.routing.layout import MODALITIES
from mllm.routing.stats import RoutingStats, Sums

WARNINGS = {
    "no gradient": "the router of {layer} is trained, but its gradient has been zero for {steps} log entries: it stays "
    'as it was drawn. Use a gate other than "none", or give balance_loss_weight a value.',
    "dead": "no token took expert {details} of {layer} for {steps} log entries, though tokens were free to. Raise "
    "balance_loss_weight, or use fewer experts.",
    "collapse": "nearly all {details} tokens took the same experts of {layer} for {steps} log entries. Raise "
    "balance_loss_weight, or lower the router's learning rate.",
    "saturated": "the router of {layer} has been certain about {details} tokens for {steps} log entries, so that "
    "hardly any gradient gets through it. Give z_loss_weight a value, or raise router_temperature.",
}


class Finding(NamedTuple):
    """What one interval says: whether a fault of that kind is there, and in what part of the layer."""

    kind: str
    layer: str
    details: str
    is_wrong: bool


@dataclass
class RoutingWatch:
    """Looks at each interval's statistics and says, once each, what has been wrong for `steps` intervals in a row.

    What an interval cannot tell, such as an image expert's fate when no picture came, neither counts nor clears. Tokens
    of modalities that may take the same experts are judged together, so that groups are not mistaken for collapse.

    Args:
        steps: intervals in a row that a fault must last.
        collapse_share: a layer has collapsed when the busiest experts, as many as a token takes, take at least this
            share of the real picks while there are others to take.
        saturated_entropy: nats below which a trained router has no gradient to speak of.
    """

    steps: int = 5
    collapse_share: float = 0.95
    saturated_entropy: float = 1e-3
    _lasting: dict[Finding, int] = field(default_factory=dict, repr=False)
    _said: set[Finding] = field(default_factory=set, repr=False)

    def observe(
        self, step: int, stats: RoutingStats, router_grad_norms: Mapping[str, float] | None = None
    ) -> list[str]:
        """The warnings that the interval ending at `step` adds. Empty statistics tell nothing.

        Args:
            stats: of that interval alone, over all ranks (`stats.all_reduce()`).
            router_grad_norms: layer -> norm of its router's gradient, trained routers only; None where nobody measured.
        """
        due: dict[tuple[str, str], list[str]] = defaultdict(list)
        for finding in self._look(stats, router_grad_norms or {}):
            fault = finding._replace(is_wrong=True)
            self._lasting[fault] = self._lasting.get(fault, 0) + 1 if finding.is_wrong else 0
            if self._lasting[fault] >= self.steps and fault not in self._said:
                self._said.add(fault)
                due[fault.kind, fault.layer].append(fault.details)
        return [
            f"step {step}: " + WARNINGS[kind].format(layer=layer, details=", ".join(details), steps=self.steps)
            for (kind, layer), details in due.items()
        ]

    def _look(self, stats: RoutingStats, norms: Mapping[str, float]) -> Iterator[Finding]:
        for layer, norm in norms.items():
            yield Finding("no gradient", layer, "", norm == 0)
        total = stats.total()
        if total is None:
            return
        for number, layer in enumerate(stats.layers):
            is_open_E = total.open_LMX[number, :, : total.num_experts].sum(0) > 0
            for expert in is_open_E.nonzero().flatten().tolist():
                yield Finding("dead", layer, str(expert), bool(total.is_dead_LE[number, expert]))
            for experts, modalities in _populations(total, number).items():
                names = " and ".join(MODALITIES[m] for m in modalities)
                share = _busiest_share(total, number, list(experts), modalities)
                if share is not None:
                    yield Finding("collapse", layer, names, share >= self.collapse_share)
                if layer in norms and len(experts) > 1:
                    tokens = total.tokens_LM1[number, modalities].sum()
                    entropy = total.entropy_LM1[number, modalities].sum() / tokens
                    yield Finding("saturated", layer, names, bool(entropy < self.saturated_entropy))


def _populations(total: Sums, number: int) -> dict[tuple[int, ...], list[int]]:
    """Real experts -> modalities whose tokens choose among just these, in one layer; only modalities that came."""
    populations: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for m, open_E in enumerate(total.open_LMX[number, :, : total.num_experts]):
        if open_E.sum() > 0:
            populations[tuple(open_E.nonzero().flatten().tolist())].append(m)
    return populations


def _busiest_share(total: Sums, number: int, experts: list[int], modalities: list[int]) -> float | None:
    """Share of real picks that the k busiest experts take, k real picks a token that has any; None without a choice."""
    picks_E = total.picks_LMX[number, modalities].sum(0)[experts].sort(descending=True).values
    tokens = total.real_picks_LMJ[number, modalities, 1:].sum()
    if tokens == 0:
        return None
    k = max(1, round(float(picks_E.sum() / tokens)))
    return float(picks_E[:k].sum() / picks_E.sum()) if k < len(experts) else None
