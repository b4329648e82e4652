"""MoleConfig: what the PEFT method MOLE needs to know."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, fields
from typing import Any

from peft.config import PeftConfig

from mllm.common.errors import UserError
from mllm.common.names import nearest
from mllm.routing import BALANCE_LOSSES, GATES, Choice, ExpertLayout, RouterSpec, Target, find_router
from mllm.routing.layout import MODALITIES
from mllm.routing.losses import SCHEDULES


class MolePeftType(enum.StrEnum):
    """A member as PEFT's own enum has: transformers and PEFT read its `value`, but nothing can be added to theirs."""

    MOLE = "MOLE"

    def __str__(self) -> str:
        return f"PeftType.{self.name}"  # what PEFT splits at the dot


PEFT_TYPE = MolePeftType.MOLE
BALANCES = (*BALANCE_LOSSES, "bias", "none")
CHOICES = {
    "gate": tuple(GATES),
    "router_input": ("block", "linear"),
    "router_reads": ("token", "picture", "both"),
    "router_start": ("domains", "clusters", "random"),
    "null_logits": ("own", "shared"),
    "null_balance": ("averaged", "each"),
    "balance": BALANCES,
    "balance_schedule": tuple(SCHEDULES),
    "expert_path": ("auto", "masked", "sorted"),
}
MASKED_UP_TO = 8  # experts: above it sorting costs less than the masked products (design, decision 3)


@dataclass(kw_only=True)
class MoleConfig(PeftConfig):
    """Sparse LoRA experts on the MLP blocks of a language model, plain LoRA beside them (LLaVA-MoLE, 2401.16160).

    In every expert block one router decides once for each token, from the block's input; all linears of the block
    follow it: y_t = W x_t + Σ_k g_k · scaling · B_k A_k dropout(x_t). Null experts (AdaMoE, 2406.13233), groups of
    experts by modality (MoMa, 2407.21770) and the kind of router are switches on the same frame.

    Args:
        r: rank of one expert, and of the plain LoRA; or a rank for each expert group (the plain LoRA takes the
            largest).
        lora_alpha: experts and LoRA are scaled by lora_alpha / r, or
        use_rslora: by lora_alpha / √r (2312.03732).
        lora_dropout: probability of dropping an input feature of an expert or LoRA.
        shared_a: all experts of a linear share one A and have a B each (HydraLoRA, 2404.19245).
        expert_path: how experts are computed: "masked" (dense products over all ranks), "sorted" (real picks only, so
            null picks save work), "auto" (masked up to 8 experts). Same result.
        num_experts: E, real experts a block. None: 4, or as many as expert_groups hold.
        expert_groups: real experts by modality, such as {"image": 2, "text": 2, "shared": 1}: a token meets its own
            modality's experts and the shared ones only.
        modality_prior: a learned bias for each modality on the router's logits: the soft form of groups.
        num_null_experts: null experts: a pick of one costs nothing and adds nothing. With groups a number counts for
            each modality, and {"image": 2, "text": 1} for each its own.
        null_logits: "own" (one learned logit each) or "shared" (one logit copied for all of a set, 2601.15370).
        top_k: K, experts a token takes, null ones included.
        top_p: leave picks out once those before them hold this much probability (2403.07652). None: take all K.
        drop_share: probability of leaving a pick out at random, in training and after: a control.
        gate: how a pick's weight enters the output: "straight_through" (1 forward, gradient of p), "softmax" (p),
            "none" (1, the router gets no task gradient; as released). See `mllm.routing.route`.
        renormalize: divide the weights of a token by their sum over its real picks. None: where top_k > 1.
        router: "learned", "frozen_random", "oracle_domain", "oracle_modality", "hash_token". See
            `mllm.routing.routers`.
        router_input: "block" (one decision for a block's linears) or "linear" (each linear has its own router and
            decides from its own input, AdaMoE's Llama form).
        router_reads: "token" (its hidden state), "picture" (the mean embedding of the row's pictures, the same for
            all tokens and layers, see `RoutingContext.picture_TD`) or "both" side by side. None: "both" where the model
            takes pictures and the router learns, else "token".
        router_start: what the weights on the picture start as, where the router reads it and the loop calls
            `start_routers` (`mllm train` does): "domains" (the linear discriminant of expert_domains), "clusters" (that
            of as many clusters of pictures as experts, for data without labels) or "random". Without expert_domains
            "domains" is "random". Routers that start right should learn at a tenth of the rate of all else, as in
            train/configs/experts.yaml: at the full rate they drift (docs/conflicts.md).
        router_temperature: the logits are divided by it.
        router_jitter: in training the router's input is multiplied by a value in [1 - jitter, 1 + jitter].
        expert_domains: the domains that experts are meant for; experts are dealt to them in turn. For
            router="oracle_domain", which must be told every row's domain, and for the domain loss, which needs them in
            training only. `mllm train` fills in those of the mixture where domain_loss_weight is above 0.
        balance: what is kept even by `routing_loss(model)`, which the loop adds to the task's loss (`mllm train`
            does; so must your own): "global_batch" (counts over all ranks and the whole optimizer step), "layer" (this
            rank's micro-batch), "sample" (as LLaVA-MoLE released it), "bias" (no loss: a bias on the choice, moved
            after each step, 2408.15664), "none". See `mllm.routing.losses`.
        balance_loss_weight: weight of the loss at the start of training.
        balance_final_weight: its weight at the end; None: it stays.
        balance_schedule: the way between them: "constant", "linear", "step" (half-way; AdaMoE's α1, α2).
        bias_update_rate: what a step moves the bias of balance="bias" by.
        null_balance: "averaged" (balance fixes the sum of null picks, AdaMoE Eq. 7) or "each" (null experts are
            balanced one by one, which is what its released Mixtral code does).
        real_share: ρ, the share of picks that should be real; the load is then ρ · top_k. None: E / (E + null experts).
        domain_loss_weight: weight of -log P(an expert of the row's domain), in training, where expert_domains are given
            and the loop tells the rows' domains (`RoutingContext.set_domains`).
        z_loss_weight: weight of the mean squared logsumexp of the router's logits.
        expert_modules: blocks that carry experts, always inside the language model where the model has one. None: its
            MLP blocks; a list of name endings; or a regular expression for the whole name.
        target_modules: linears that carry plain LoRA, found likewise. None: the attention projections; [] for none.
        modules_to_save: modules trained in full and saved with the adapter. None: the multi_modal_projector where the
            model has one; [] for none.
    """

    r: int | dict[str, int] = 16
    lora_alpha: float = 32
    use_rslora: bool = False
    lora_dropout: float = 0.0
    shared_a: bool = False
    expert_path: str = "auto"
    num_experts: int | None = None
    expert_groups: dict[str, int] | None = None
    modality_prior: bool = False
    num_null_experts: int | dict[str, int] = 0
    null_logits: str = "own"
    top_k: int = 1
    top_p: float | None = None
    drop_share: float = 0.0
    gate: str = "straight_through"
    renormalize: bool | None = None
    router: str = "learned"
    router_input: str = "block"
    router_reads: str | None = None
    router_start: str = "domains"
    router_temperature: float = 1.0
    router_jitter: float = 0.0
    expert_domains: list[str] | None = None
    balance: str = "global_batch"
    balance_loss_weight: float = 0.01
    balance_final_weight: float | None = None
    balance_schedule: str = "constant"
    bias_update_rate: float = 1e-3
    null_balance: str = "averaged"
    real_share: float | None = None
    domain_loss_weight: float = 1.0
    z_loss_weight: float = 0.0
    expert_modules: list[str] | str | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __new__(cls, *_: Any, **values: Any) -> MoleConfig:
        # Before __init__, whose TypeError PEFT turns into a warning when it reads adapter_config.json.
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UserError(f"MoleConfig has no field {name!r}{nearest(name, known)}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.expert_groups is not None:
            in_groups = sum(self.expert_groups.values())
            if self.num_experts not in (None, in_groups):
                raise UserError(
                    f"MoleConfig.num_experts={self.num_experts}, but expert_groups={self.expert_groups} hold "
                    f"{in_groups}; leave num_experts out."
                )
            self.num_experts = in_groups
        elif self.num_experts is None:
            self.num_experts = 4
        self._check_values()
        self._check_combination()
        if self.expert_path == "auto":
            self.expert_path = "masked" if self.num_experts <= MASKED_UP_TO else "sorted"

    def _check_values(self) -> None:
        for name, least in {"num_experts": 1, "top_k": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"MoleConfig.{name} must be at least {least}, got {getattr(self, name)}.")
        for rank in self.r.values() if isinstance(self.r, dict) else [self.r]:
            if rank < 1:
                raise UserError(f"MoleConfig.r must be at least 1, got {self.r}.")
        if isinstance(self.num_null_experts, int) and self.num_null_experts < 0:
            raise UserError(f"MoleConfig.num_null_experts must not be negative, got {self.num_null_experts}.")
        for name in ("lora_dropout", "drop_share", "router_jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"MoleConfig.{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("top_p", "real_share"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                raise UserError(f"MoleConfig.{name} must be in (0, 1], got {getattr(self, name)}.")
        for name in (
            "balance_loss_weight",
            "balance_final_weight",
            "z_loss_weight",
            "domain_loss_weight",
            "bias_update_rate",
        ):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"MoleConfig.{name} must not be negative, got {getattr(self, name)}.")
        if self.router_temperature <= 0:
            raise UserError(f"MoleConfig.router_temperature must be above 0, got {self.router_temperature}.")
        find_router(self.router)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices and not (name == "router_reads" and self.router_reads is None):
                raise UserError(
                    f"MoleConfig.{name}={getattr(self, name)!r} is not known; choose one of {', '.join(choices)}."
                )
        if self.target_modules == "all-linear":
            raise UserError(
                'MoleConfig.target_modules="all-linear" would put plain LoRA on the linears that carry experts. Leave '
                "it None for the attention projections, or name the modules."
            )

    def _check_combination(self) -> None:
        """Refuses what would silently mean something else than it says."""
        layout = self.layout
        for row, name in zip(layout.allowed_PX, MODALITIES if layout.is_grouped else ("all",), strict=True):
            if self.top_k > row.sum():
                raise UserError(
                    f"MoleConfig.top_k={self.top_k} exceeds the {int(row.sum())} experts that {name} tokens can take, "
                    "null experts included (num_experts, expert_groups, num_null_experts)."
                )
        if isinstance(self.r, dict) and set(self.r) != set(layout.groups):
            raise UserError(f"MoleConfig.r={self.r} must name the expert groups: {', '.join(layout.groups)}.")
        if self.shared_a and len(set(self.ranks)) > 1:
            raise UserError(f"MoleConfig.shared_a needs one rank for all experts, got r={self.r}.")
        router = find_router(self.router)
        has_nulls, learns, options = layout.num_null_experts > 0, router.learns, router.options
        refused = {
            "real_share needs num_null_experts": self.real_share is not None and not has_nulls,
            "real_share must be below 1 with null experts; set num_null_experts=0 instead": has_nulls
            and self.real_share == 1,
            "real_share with groups needs null experts for each modality": self.real_share is not None
            and layout.is_grouped
            and set(layout.nulls) != set(MODALITIES),
            'null_logits="shared" needs num_null_experts': self.null_logits == "shared" and not has_nulls,
            'modality_prior needs router="learned"': self.modality_prior
            and not (learns and "modality_prior" in options),
            'router_jitter needs router="learned"': self.router_jitter > 0 and not (learns and "jitter" in options),
            f"router={self.router!r} has no null_logits": self.null_logits == "shared" and "null_logits" not in options,
            f"router={self.router!r} has no start from clusters of pictures": self.router_start == "clusters"
            and learns
            and not router.is_linear,
            'expert_domains needs router="oracle_domain", or one that learns': bool(self.expert_domains)
            and self.router != "oracle_domain"
            and not learns,
            'router_start="clusters" goes without labels: leave expert_domains out': self.router_start == "clusters"
            and bool(self.expert_domains),
            'router_start="clusters" needs a router that reads pictures': self.router_start == "clusters"
            and (self.router_reads == "token" or self.router_input == "linear" or not learns),
            'router_reads="picture" or "both" needs router_input="block": a linear is told nothing but its own input': (
                self.router_input == "linear" and self.router_reads in ("picture", "both")
            ),
            f"router={self.router!r} decides by rule and reads nothing: leave router_reads out": self.is_fixed
            and self.router_reads not in (None, "token"),
            'router="oracle_domain" needs expert_domains, the domains in the order of experts': self.router
            == "oracle_domain"
            and not self.expert_domains,
            f"router={self.router!r} decides by rule: it cannot choose null experts or go by groups": self.is_fixed
            and (has_nulls or layout.is_grouped),
            f'router={self.router!r} does not learn, so balance must be "none"': not learns
            and self.balance not in ("none", "bias"),
            f'router={self.router!r} decides by rule, so balance must be "none"': self.is_fixed
            and self.balance == "bias",
            'renormalize=True with top_k=1 and gate="softmax" makes every weight 1: its router learns nothing': bool(
                self.renormalize
            )
            and self.top_k == 1
            and self.gate == "softmax",
            f"router={self.router!r} has no router_temperature": "temperature" not in options
            and self.router_temperature != 1,
            f"router={self.router!r} does not learn, so z_loss_weight must be 0": not learns and self.z_loss_weight > 0,
            'real_share is an aim of balance, so balance must not be "none" or weigh nothing': self.real_share
            is not None
            and self.balance != "bias"
            and (self.balance == "none" or not (self.balance_loss_weight or self.balance_final_weight)),
            f"real_share={self.real_share} cannot be met: top_k={self.top_k} picks of so many experts and null experts "
            "are always more, or less, often real": not self._can_meet_real_share(),
            f"balance_schedule={self.balance_schedule!r} needs a balance loss, not balance={self.balance!r}": (
                self.balance_schedule != "constant" and self.balance not in BALANCE_LOSSES
            ),
            "balance_final_weight and balance_schedule come together": (self.balance_final_weight is None)
            != (self.balance_schedule == "constant"),
        }
        for reason, applies in refused.items():
            if applies:
                raise UserError(f"MoleConfig: {reason}.")

    def _can_meet_real_share(self) -> bool:
        """Whether a token has enough real and enough null experts to choose for a share of real_share."""
        if self.real_share is None:
            return True
        real_P = self.layout.allowed_PX[:, : self.num_experts].sum(1)
        null_P = self.layout.allowed_PX[:, self.num_experts :].sum(1)
        real_due, null_due = self.real_share * self.top_k, (1 - self.real_share) * self.top_k
        return bool((real_due <= real_P).all() and (null_due <= null_P).all())

    @property
    def is_fixed(self) -> bool:
        """Whether the router decides by rule, without weights."""
        return find_router(self.router).fixed

    @property
    def learns(self) -> bool:
        """Whether the router has weights that are trained."""
        return find_router(self.router).learns

    @property
    def balances_by_loss(self) -> bool:
        """Whether a balance loss with a weight, now or later, is added to the task's."""
        return self.balance in BALANCE_LOSSES and (self.balance_loss_weight > 0 or bool(self.balance_final_weight))

    @property
    def has_losses(self) -> bool:
        """Whether training has to do something about routing after each forward (see `mllm.RoutingObjective`)."""
        return self.balances_by_loss or self.balance == "bias" or self.z_loss_weight > 0 or self.teaches_domains

    @property
    def teaches_domains(self) -> bool:
        """Whether the domain loss is on."""
        return self.learns and bool(self.expert_domains) and self.domain_loss_weight > 0

    @property
    def starts_from_pictures(self) -> bool:
        """Whether `start_routers` has something to set."""
        reads = (
            self.learns
            and find_router(self.router).is_linear
            and self.router_reads != "token"
            and self.router_input == "block"
        )
        return reads and (
            self.router_start == "clusters" or (self.router_start == "domains" and bool(self.expert_domains))
        )

    @property
    def layout(self) -> ExpertLayout:
        """Which experts there are."""
        return ExpertLayout.of(self.num_experts, self.expert_groups, self.num_null_experts)

    @property
    def ranks(self) -> list[int]:
        """[E] rank of each expert."""
        if isinstance(self.r, dict):
            return [self.r[group] for group in self.layout.group_of_expert]
        return [self.r] * self.num_experts

    @property
    def plain_rank(self) -> int:
        """Rank of the plain LoRA."""
        return max(self.ranks)

    @property
    def choice(self) -> Choice:
        """How experts are chosen and weighed."""
        return Choice(self.top_k, self.gate, self.renormalize, self.top_p, self.drop_share)

    @property
    def target(self) -> Target:
        """What balance aims at."""
        return Target.of(self.layout, self.real_share, self.null_balance)

    def router_spec(self, width: int) -> RouterSpec:
        """What a router for hidden states of that width is built from."""
        return RouterSpec(
            width=width,
            layout=self.layout,
            null_logits=self.null_logits,
            temperature=self.router_temperature,
            jitter=self.router_jitter,
            modality_prior=self.modality_prior,
            domains=tuple(self.expert_domains or ()),
        )

    def scaling(self, rank: int) -> float:
        """What the output of an expert or LoRA of that rank is multiplied by."""
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)
