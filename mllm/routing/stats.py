"""What routing did over many forward passes: sums until somebody prints them.

L routed layers, T tokens, E real experts, X = E + null experts, O = E outcomes of a pick, and one more for all null
experts together where there are any, K picks, J = K + 1 possible numbers of real picks of a token, M = 2 modalities
(text, image), C cells that tokens are summed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm.common import ranks
from mllm.common.errors import UserError
from mllm.routing.context import RoutingContext
from mllm.routing.layout import MODALITIES
from mllm.routing.losses import pool
from mllm.routing.routing import Routing

ALL = "all"  # the domain of tokens whose domain nobody told
PER_GROUP = ("load", "null_share", "entropy")  # figures that are told by modality and by domain too


@dataclass(frozen=True)
class Sums:
    """Sums over tokens, float64 on the CPU, and the figures they give.

    `open_LMX` counts the tokens that were free to take an expert, so that an expert of a modality that did not come is
    told from one that nobody wants. `real_picks_LMJ` counts the tokens with 0, 1 … K real picks. `entropy_LM1` is that
    of a token's probabilities over real experts, scaled to sum to one: null experts are one another's copies.
    """

    num_experts: int
    tokens_LM1: Tensor
    picks_LMX: Tensor
    open_LMX: Tensor
    probs_LMX: Tensor
    entropy_LM1: Tensor
    real_picks_LMJ: Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.num_experts, **{name: getattr(self, name) + getattr(other, name) for name in _COLUMNS})

    def of(self, modality: str) -> Sums:
        """The same with the tokens of one modality only."""
        m = MODALITIES.index(modality)
        return Sums(self.num_experts, **{name: getattr(self, name)[:, m : m + 1] for name in _COLUMNS})

    @property
    def num_tokens(self) -> int:
        """Every layer sees the same tokens."""
        return int(self.tokens_LM1[0].sum())

    @property
    def outcomes_LO(self) -> Tensor:
        """Picks of each real expert, then those of all null experts together where there are any."""
        real_LE, null_LN = self.picks_LMX.sum(1).tensor_split([self.num_experts], dim=-1)
        return torch.cat([real_LE, null_LN.sum(-1, keepdim=True)], dim=-1) if null_LN.shape[-1] else real_LE

    @property
    def shares_LO(self) -> Tensor:
        """Share of all picks taken."""
        return self.outcomes_LO / self.outcomes_LO.sum(-1, keepdim=True).clamp(min=1)

    @property
    def is_dead_LE(self) -> Tensor:
        """Real experts that took no token although some token was free to take them."""
        picks_LX, open_LX = self.picks_LMX.sum(1), self.open_LMX.sum(1)
        return ((picks_LX == 0) & (open_LX > 0))[:, : self.num_experts]

    def figures_L(self) -> dict[str, Tensor]:
        """Name -> [L]; see RoutingStats.summary for what each means."""
        tokens = max(self.num_tokens, 1)
        picks_LX, counts_LJ = self.picks_LMX.sum(1), self.real_picks_LMJ.sum(1)
        real_LE, all_L = picks_LX[:, : self.num_experts], picks_LX.sum(-1)
        real_L = real_LE.sum(-1)
        load_L = real_L / tokens
        from_mean_LJ = torch.arange(counts_LJ.shape[-1]) - load_L[:, None]
        return {
            "load": load_L,
            "load_variance": (counts_LJ * from_mean_LJ.square()).sum(-1) / tokens,
            "empty_share": counts_LJ[:, 0] / tokens,
            "null_share": (all_L - real_L) / all_L.clamp(min=1),
            "entropy": self.entropy_LM1.sum((1, 2)) / tokens,
            "max_share": real_LE.amax(-1) / real_L.clamp(min=1),
            "dead_experts": self.is_dead_LE.sum(-1).double(),
        }


def mutual_information(counts_LCO: Tensor) -> Tensor:
    """I(cell; outcome) [L] in nats from counts: H(cell) + H(outcome) - H(cell, outcome), 0 for a single cell.

    The plug-in estimate: too high by about (C - 1)(O - 1) / 2N of N picks, which a log interval makes negligible.
    """
    joint_LCO = counts_LCO / counts_LCO.sum((1, 2), keepdim=True).clamp(min=1)
    entropy_of = torch.special.entr
    cells_L, outcomes_L = entropy_of(joint_LCO.sum(2)).sum(1), entropy_of(joint_LCO.sum(1)).sum(1)
    return (cells_L + outcomes_L - entropy_of(joint_LCO).sum((1, 2))).clamp(min=0)


class RoutingStats:
    """Picks, probabilities and entropies by layer × expert × modality × domain.

    Example: `stats.update(routing_context(model), domains)` after every forward, then `stats.all_reduce().summary()`.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self._sums: dict[str, Sums] = {}

    # -- gathering -----------------------------------------------------------------------------------------------------

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
        if self.layers not in ([], context.layers):
            raise UserError(
                f"These statistics hold the layers {self.layers}, the forward routed {context.layers}; use one "
                "RoutingStats a model."
            )
        names = sorted(set(domains))
        counted = _count(context, [names.index(domain) for domain in domains])
        self.layers = context.layers
        self._add(dict(zip(names, counted, strict=True)))

    def _add(self, sums_of_domain: dict[str, Sums]) -> None:
        for name, sums in sums_of_domain.items():
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def merge(self, other: RoutingStats) -> RoutingStats:
        """A new RoutingStats with the sums of both."""
        merged = RoutingStats()
        merged.layers = self.layers or other.layers
        merged._add(self._sums)
        merged._add(other._sums)
        return merged

    def all_reduce(self) -> RoutingStats:
        """The sums of all ranks as a new RoutingStats; self is unchanged. All ranks must call it together."""
        total = RoutingStats()
        for part in ranks.all_gathered(self):
            total = total.merge(part)
        return total

    # -- telling -------------------------------------------------------------------------------------------------------

    def total(self) -> Sums | None:
        """The sums over all domains; None before the first update."""
        parts = list(self._sums.values())
        return sum(parts[1:], parts[0]) if parts else None

    def by_domain(self) -> dict[str, Sums]:
        """Domain -> its sums, in alphabetical order."""
        return dict(sorted(self._sums.items()))

    def by_modality(self) -> dict[str, Sums]:
        """Modality -> its sums over all domains; only modalities that had tokens."""
        total = self.total()
        parts = {} if total is None else {name: total.of(name) for name in MODALITIES}
        return {name: sums for name, sums in parts.items() if sums.num_tokens}

    def summary(self) -> dict[str, float]:
        """Flat figures for a log; empty before the first update.

        routing/load/<layer>          mean real experts a token
        routing/null_share/<layer>    share of the picks taken that are null
        routing/entropy/<layer>       mean entropy in nats of a token's probabilities over real experts (ln E: the
                                      router does not care)
        routing/max_share/<layer>     share of real picks of the busiest expert (1/E when even, 1 when collapsed)
        routing/dead_experts/<layer>  real experts that took no token though some token was free to take them
        routing/mi_domain/<layer>     mutual information of a pick and its token's domain in nats, null picks counting
        routing/mi_modality/<layer>   as one more expert; 0 with one domain, or modality
        and the same without a layer: the mean over layers, for dead experts the sum. Over all layers only:
        routing/load_variance         variance over tokens of their number of real experts
        routing/empty_share           share of tokens without a real expert
        routing/mi_domain_ratio       mutual information over the entropy of the domain: 1 when a pick tells it
        routing/mi_modality_ratio
        routing/{load,null_share,entropy}/{text,image}, and …/domain/<domain> where there are several
        """
        total = self.total()
        if total is None:
            return {}
        information_L, ratios = self._information()
        by_layer = total.figures_L()
        figures = {f"routing/{name}": float(values_L.mean()) for name, values_L in (by_layer | information_L).items()}
        figures["routing/dead_experts"] = float(by_layer["dead_experts"].sum())
        figures |= {f"routing/{name}": value for name, value in ratios.items()}
        for name, values_L in (by_layer | information_L).items():
            if name not in ("load_variance", "empty_share"):
                figures |= {f"routing/{name}/{layer}": float(v) for layer, v in zip(self.layers, values_L, strict=True)}
        groups = {f"domain/{name}": sums for name, sums in self.by_domain().items()} if len(self._sums) > 1 else {}
        for group, sums in (self.by_modality() | groups).items():
            figures |= {f"routing/{name}/{group}": float(sums.figures_L()[name].mean()) for name in PER_GROUP}
        return figures

    def _information(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Mutual information with domain and modality: [L] in nats, and over the entropy of the domain or modality."""
        information_L, ratios = {}, {}
        for name, parts in {"mi_domain": self.by_domain(), "mi_modality": self.by_modality()}.items():
            counts_LCO = torch.stack([sums.outcomes_LO for sums in parts.values()], dim=1)
            information_L[name] = mutual_information(counts_LCO)
            # A cell tells itself: its information with itself is its entropy.
            entropy_L = mutual_information(torch.diag_embed(counts_LCO.sum(2)))
            ratios[f"{name}_ratio"] = float((information_L[name] / entropy_L.where(entropy_L > 0, 1)).mean())
        return information_L, ratios

    def shares(self) -> dict[str, dict[str, list[float]]]:
        """domain -> layer -> share of the domain's picks that each real expert took and, where the model has null
        experts, as one more number at the end, all of those together.
        """
        return {name: self._layered(sums.shares_LO) for name, sums in self.by_domain().items()}

    def _layered(self, values_LO: Tensor) -> dict[str, list[float]]:
        return dict(zip(self.layers, values_LO.tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values.

        `layers`, `experts` (what the numbers of a share stand for: "0", "1" … and "null"), `summary`, `shares` by
        domain, `modality_shares`, `figures` by domain and modality (means over layers, names as in `summary`), and
        under `domains`, by domain and modality, the tokens, picks [layer][expert, null ones too], real_picks
        [layer][tokens with 0, 1 … K real picks], mean probabilities [layer][expert] and mean entropies [layer].
        """
        total = self.total()
        return {
            "layers": self.layers,
            "experts": [] if total is None else _expert_names(total),
            "summary": self.summary(),
            "shares": self.shares(),
            "modality_shares": {name: self._layered(sums.shares_LO) for name, sums in self.by_modality().items()},
            "figures": {
                "domain": {name: _means(sums) for name, sums in self.by_domain().items()},
                "modality": {name: _means(sums) for name, sums in self.by_modality().items()},
            },
            "domains": {
                name: {modality: _cell(sums.of(modality)) for modality in MODALITIES}
                for name, sums in self.by_domain().items()
            },
        }


def _expert_names(sums: Sums) -> list[str]:
    return [str(e) if e < sums.num_experts else "null" for e in range(sums.outcomes_LO.shape[-1])]


def _means(sums: Sums) -> dict[str, float]:
    figures = {name: float(values_L.mean()) for name, values_L in sums.figures_L().items()}
    return figures | {"dead_experts": float(sums.is_dead_LE.sum())}


def _cell(sums: Sums) -> dict[str, Any]:
    tokens = max(sums.num_tokens, 1)
    return {
        "tokens": sums.num_tokens,
        "picks": sums.picks_LMX[:, 0].tolist(),
        "real_picks": sums.real_picks_LMJ[:, 0].tolist(),
        "mean_probs": (sums.probs_LMX[:, 0] / tokens).tolist(),
        "entropy": (sums.entropy_LM1[:, 0, 0] / tokens).tolist(),
    }


def _entropy_T1(routing: Routing) -> Tensor:
    real_TE = F.normalize(routing.router_probs_TX[:, : routing.num_experts], p=1, dim=1)
    return torch.special.entr(real_TE).sum(1, keepdim=True)


# What is summed of each token: field of Sums -> fp32 [T, …] of one layer.
_COLUMNS: dict[str, Callable[[Routing], Tensor]] = {
    "tokens_LM1": lambda routing: torch.ones_like(routing.router_probs_TX[:, :1]),
    "picks_LMX": lambda routing: routing.picks_TX,
    "open_LMX": lambda routing: (~routing.router_logits_TX.isneginf()).float(),
    "probs_LMX": lambda routing: routing.router_probs_TX,
    "entropy_LM1": _entropy_T1,
    "real_picks_LMJ": lambda routing: F.one_hot(routing.is_real_TK.sum(1), routing.is_real_TK.shape[1] + 1).float(),
}


def _count(context: RoutingContext, domain_of_row: list[int]) -> list[Sums]:
    """Sums of one forward for each domain, pooled over (domain, modality) cells for all layers together."""
    num_modalities, num_experts = len(MODALITIES), next(iter(context.routings.values())).num_experts
    domain_B = torch.tensor(domain_of_row, device=context.sample_T.device)
    cell_T = domain_B[context.sample_T] * num_modalities + context.modality_T
    num_domains = max(domain_of_row) + 1
    sums_of_domain: list[dict[str, Tensor]] = [{} for _ in range(num_domains)]
    for name, column in _COLUMNS.items():
        values_LTF = context.stack(column)
        cells_LCF = pool(values_LTF, cell_T, num_domains * num_modalities, ~context.is_pad_T).cpu().double()
        for sums, cells_LMF in zip(sums_of_domain, cells_LCF.split(num_modalities, dim=1), strict=True):
            sums[name] = cells_LMF
    return [Sums(num_experts, **sums) for sums in sums_of_domain]
