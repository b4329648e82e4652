"""Which experts a router chooses among: real ones group by group, then null ones.

E real experts, X = E + null experts, P populations: the sets of tokens that choose among the same experts (one without
groups, one a modality with them). Real experts have the ids 0 .. E-1, null experts E .. X-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mllm.common.errors import UserError

MODALITIES = ("text", "image")
SHARED = "shared"
ALL = "all"


@dataclass(frozen=True)
class ExpertLayout:
    """Groups and their sizes, in the order of expert ids.

    `groups` is {"all": E}, or names "text", "image" and "shared" with their number of experts (MoMa's groups,
    2407.21770, with shared experts as in MoIIE, 2508.09779). `nulls` is {}, {"all": m}, or a number of null experts for
    each modality. Groups stand in the order text, image, shared, however they were given: an adapter's saved
    configuration does not keep their order.
    """

    groups: dict[str, int]
    nulls: dict[str, int]

    @classmethod
    def of(
        cls, num_experts: int, expert_groups: dict[str, int] | None = None, num_null_experts: int | dict[str, int] = 0
    ) -> ExpertLayout:
        """From the fields of MoleConfig.

        A number of null experts counts for all tokens without groups, and for each modality with them: null experts
        are then each modality's own. Raises UserError for unknown names, for sizes below zero and for a modality left
        without a real expert.
        """
        if expert_groups is None:
            if isinstance(num_null_experts, dict):
                raise UserError(
                    f"num_null_experts={num_null_experts} names modalities, but there are no expert_groups: give one "
                    "number, or groups."
                )
            nulls = {ALL: num_null_experts} if num_null_experts else {}
            return cls({ALL: num_experts}, nulls)
        _check_names("expert_groups", expert_groups, (*MODALITIES, SHARED))
        nulls = num_null_experts
        if isinstance(nulls, dict):
            _check_names("num_null_experts", nulls, MODALITIES)
        else:
            nulls = dict.fromkeys(MODALITIES, nulls)
        layout = cls(
            {name: expert_groups[name] for name in (*MODALITIES, SHARED) if expert_groups.get(name)},
            {name: nulls[name] for name in MODALITIES if nulls.get(name)},
        )
        for modality in MODALITIES:
            if not any(name in (modality, SHARED) for name in layout.groups):
                raise UserError(
                    f"expert_groups={expert_groups} leaves {modality} tokens without an expert: give {modality!r} or "
                    "'shared' at least one."
                )
        return layout

    @property
    def num_experts(self) -> int:
        """E."""
        return sum(self.groups.values())

    @property
    def num_null_experts(self) -> int:
        """X - E."""
        return sum(self.nulls.values())

    @property
    def is_grouped(self) -> bool:
        """Whether tokens of different modalities choose among different experts."""
        return ALL not in self.groups

    @property
    def group_of_expert(self) -> list[str]:
        """[E] the group of each real expert."""
        return [name for name, size in self.groups.items() for _ in range(size)]

    @property
    def null_sets(self) -> list[slice]:
        """Ids of null experts that stand for the same nothing, set by set."""
        ends = list(accumulate(self.nulls.values(), initial=self.num_experts))
        return [slice(start, end) for start, end in pairwise(ends)]

    @property
    def allowed_PX(self) -> Tensor:
        """bool [P, X] which experts a population chooses among; with groups one row for each of MODALITIES."""
        owners = [*self.group_of_expert, *(name for name, size in self.nulls.items() for _ in range(size))]
        if not self.is_grouped:
            return torch.ones(1, len(owners), dtype=torch.bool)
        return torch.tensor([[owner in (modality, SHARED) for owner in owners] for modality in MODALITIES])

    def due_PDE(self, num_domains: int) -> Tensor:
        """bool [P, D, E] the real experts that a population's tokens of each of D domains should take.

        The experts that it may take are dealt to the domains in turn; where there are fewer experts than domains, the
        domains to the experts.
        """
        due_PDE = torch.zeros(len(self.allowed_PX), num_domains, self.num_experts, dtype=torch.bool)
        for due_DE, allowed_X in zip(due_PDE, self.allowed_PX, strict=True):
            experts = allowed_X[: self.num_experts].nonzero().flatten().tolist()
            for turn in range(max(len(experts), num_domains)):
                due_DE[turn % num_domains, experts[turn % len(experts)]] = True
        return due_PDE

    def target_PX(self, real_share: float | None = None) -> Tensor:
        """fp32 [P, X] the share of its picks that a population should give each expert; rows sum to one.

        Even over all experts allowed, or, with real_share (ρ of 2601.15370), ρ spread evenly over the real ones and
        1 - ρ over the null ones. Then the load is ρ · K.
        """
        allowed_PX = self.allowed_PX.float()
        if real_share is None:
            return allowed_PX / allowed_PX.sum(1, keepdim=True)
        real_PX, null_PX = allowed_PX.clone(), allowed_PX.clone()
        real_PX[:, self.num_experts :] = 0
        null_PX[:, : self.num_experts] = 0
        return real_share * real_PX / real_PX.sum(1, keepdim=True) + (1 - real_share) * null_PX / null_PX.sum(
            1, keepdim=True
        )


def _check_names(field: str, sizes: dict[str, int], known: tuple[str, ...]) -> None:
    for name, size in sizes.items():
        if name not in known:
            raise UserError(f"{field} has a group {name!r}; groups are {', '.join(known)}.")
        if not isinstance(size, int) or size < 0:
            raise UserError(f"{field}[{name!r}] must be a whole number from 0 on, got {size!r}.")
