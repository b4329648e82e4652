"""The arms: ways of training on the same samples. One line each; add yours to the table.

E experts. What an arm says of itself goes over the frame that all share (`adapter` of the config) into a MoleConfig.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm.mole import MoleConfig
from train.parts import make_adapter

Settings = Mapping[str, Any] | Callable[[int, Sequence[str]], Mapping[str, Any]]  # or of E and the domains' names


@dataclass(frozen=True)
class Arm:
    """`settings` None tunes all weights of the language model instead of an adapter.

    trains: "mix", or "domain": a model for each domain, scored on it, or "twice": the mix with twice the samples, or
        "nothing": the base as it is.
    rate: what every learning rate of the grid is multiplied by.
    router_rate: what routers' learning rate is beside that of all else.
    is_control: stands there to be compared with, and is no answer to a conflict.
    """

    name: str
    says: str
    settings: Settings | None = field(default_factory=dict, hash=False)
    trains: Literal["mix", "domain", "twice", "nothing"] = "mix"
    rate: float = 1.0
    router_rate: float = 1.0
    is_control: bool = False


# One expert that every token takes, by a rule that has no weights and costs nothing, is plain LoRA.
LORA = {"num_experts": 1, "router": "hash_token", "balance": "none"}
# All E experts for every token, each counting fully, are LoRA of rank E · r with the scaling and first weights of one
# expert, and leave LoRA on other linears at rank r. Their router decides nothing.
ALL_EXPERTS = {"gate": "none", "renormalize": False, "router": "frozen_random", "balance": "none"}
ALL_EXPERTS |= {"expert_path": "masked"}


# The papers' routers see the token alone, start at random and know no domain.
PAPER = {"router_reads": "token", "domain_loss_weight": 0.0}
FROZEN = {"router": "frozen_random", "balance": "none"}
RELEASED = {"gate": "none", "balance": "sample"}
ADAMOE = {"top_k": 4, "num_null_experts": 5, "gate": "softmax", "renormalize": True}
ANNEALED = {"balance_loss_weight": 0.08, "balance_final_weight": 4e-4, "balance_schedule": "step"}


SLOW = 0.1  # the rate of routers that start right, beside everything else's: see docs/conflicts.md


def _taught(**changes: Any) -> Settings:
    """MoleConfig's defaults, with the domains known in training, and what differs from them."""
    return lambda experts, domains: {"expert_domains": list(domains)} | changes


def _wide(experts: int, domains: Sequence[str]) -> dict[str, Any]:
    return PAPER | ALL_EXPERTS | {"num_experts": experts, "top_k": experts}


def _oracle(experts: int, domains: Sequence[str]) -> dict[str, Any]:
    return {"router": "oracle_domain", "expert_domains": list(domains), "balance": "none"}


def _groups(experts: int, domains: Sequence[str]) -> dict[str, Any]:
    """A third of the experts for each modality, the rest for both."""
    own = max(1, experts // 3)
    return PAPER | {"num_experts": None, "expert_groups": {"image": own, "text": own, "shared": experts - 2 * own}}


def _combined(experts: int, domains: Sequence[str]) -> dict[str, Any]:
    """As train/configs/combined.yaml: as many nulls as a modality has real experts, half of two picks real."""
    groups = _groups(experts, domains)
    nulls = {name: groups["expert_groups"][name] + groups["expert_groups"]["shared"] for name in ("image", "text")}
    rest = {"null_logits": "shared", "top_k": 2, "real_share": 0.5, "z_loss_weight": 1e-3, "balance_loss_weight": 0.02}
    return groups | {"num_null_experts": nulls} | rest


def _taught_combined(experts: int, domains: Sequence[str]) -> dict[str, Any]:
    values = dict(_combined(experts, domains)) | {"expert_domains": list(domains)}
    return {key: value for key, value in values.items() if key not in PAPER}


_TABLE = (
    Arm("base", "the base, not trained at all", LORA, trains="nothing", is_control=True),
    Arm("single", "LoRA on each domain alone", LORA, trains="domain", is_control=True),
    Arm("mix", "LoRA on the mix", LORA),
    Arm("wide", "LoRA on the mix at E times the rank: as many weights as the experts", _wide),
    Arm("twice", "LoRA on the mix with twice the samples", LORA, trains="twice", is_control=True),
    Arm("full", "all weights of the language model, on the mix", None, rate=0.1),
    Arm("mole", "experts as LLaVA-MoLE claims them; straight-through gate, balance over the whole batch", PAPER),
    Arm("mole_softmax", "mole, the pick weighed by its probability", PAPER | {"gate": "softmax"}),
    Arm("mole_released", "mole, as released: no gate, balance in each sample", PAPER | RELEASED),
    Arm("mole_frozen", "mole with a random router that never learns", PAPER | FROZEN, is_control=True),
    Arm("mole_oracle", "mole, the sample's domain told, in use too: an expert a domain", _oracle, is_control=True),
    Arm("mole_linear", "mole, a router for every linear", PAPER | {"router_input": "linear"}),
    Arm("balance_none", "mole without balance", PAPER | {"balance": "none"}),
    Arm("balance_sample", "mole, balance in each sample", PAPER | {"balance": "sample"}),
    Arm("balance_layer", "mole, balance in each micro-batch of a layer", PAPER | {"balance": "layer"}),
    Arm("groups", "experts of image tokens, of text tokens and shared ones (MoMa)", _groups),
    Arm("nulls", "null experts as adamoe.yaml has them: 4 picks, 5 nulls, a router a linear, its balance weights",
        PAPER | ADAMOE | ANNEALED | {"router_input": "linear"}),
    Arm("combined", "groups, null experts with a shared logit, a target load, z loss, as combined.yaml", _combined),
    Arm("experts", "MoleConfig's defaults: routers read the picture, start from domains, are taught them",
        _taught(), router_rate=SLOW),
    Arm("fast_router", "experts, routers at the rate of all else", _taught()),
    Arm("picture", "experts, the router reads the picture alone", _taught(router_reads="picture"), router_rate=SLOW),
    Arm("no_start", "experts, the router starts at random; rate of all else", _taught(router_start="random")),
    Arm("only_start", "experts, the domains start the router and teach it no further",
        _taught(domain_loss_weight=0.0), router_rate=SLOW),
    Arm("clusters", "experts without labels: started from clusters of pictures",
        {"router_start": "clusters"}, router_rate=SLOW),
    Arm("no_labels", "experts without labels: reads token and picture, starts at random; rate of all else",
        {"domain_loss_weight": 0.0}),
    Arm("taught_token", "experts, the router reads the token alone; rate of all else", _taught(router_reads="token")),
    Arm("shared_a", "experts that share A (HydraLoRA)", _taught(shared_a=True), router_rate=SLOW),
    Arm("taught_combined", "combined, but the router as in experts", _taught_combined, router_rate=SLOW),
)  # fmt: skip
ARMS = {arm.name: arm for arm in _TABLE}
TRIES = [
    "fast_router",
    "picture",
    "no_start",
    "only_start",
    "clusters",
    "no_labels",
    "taught_token",
    "shared_a",
    "taught_combined",
]
GROUPS = {
    "all": list(ARMS),
    "tries": TRIES,  # what was tried on the way to the defaults
    "named": [name for name in ARMS if name not in TRIES],
    "main": ["base", "single", "mix", "wide", "twice", "mole", "mole_frozen", "mole_oracle", "experts"],
}


def own_arm(name: str, settings: Mapping[str, Any]) -> Arm:
    """An arm from a user's config: fields of MoleConfig, and perhaps `router_rate`."""
    says = ", ".join(f"{key} {value}" for key, value in settings.items()) or "the frame as it is"
    fields = {key: value for key, value in settings.items() if key != "router_rate"}
    return Arm(name, says, fields, router_rate=settings.get("router_rate", 1.0))


def adapter_values(arm: Arm, frame: Mapping[str, Any], domains: Sequence[str]) -> dict[str, Any] | None:
    """The arm's fields of MoleConfig, as JSON values; None where all weights are tuned.

    Pictures are embedded once, before training, so nothing outside the language model is trained.
    """
    if arm.settings is None:
        return None
    experts = frame["num_experts"] or len(domains)
    settings = arm.settings(experts, domains) if callable(arm.settings) else arm.settings
    return {**frame, "num_experts": experts, "modules_to_save": [], **settings}


def adapter_of(arm: Arm, values: Mapping[str, Any] | None) -> MoleConfig | None:
    """Raises UserError naming the arm and the field for values that do not go together."""
    return None if values is None else make_adapter({"type": "mole", **values}, f"arm {arm.name}")
