"""MomaConfig: what the model is, as data. Dense, mixed, and split models differ in `expert_groups` alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from transformers import LlamaConfig

from mllm.common.errors import UserError
from mllm.routing import BALANCE_LOSSES, MODALITIES, ExpertLayout, Target
from mllm.routing.layout import ALL

CHOICES = {
    "routing": ("expert_choice", "token_choice"),
    "causal_routing": ("threshold", "aux"),
    "choice_batch": ("rank", "global"),
    "norm_position": ("post", "expert", "pre"),
    "null_logits": ("shared", "own"),
    "null_balance": ("averaged", "each"),
    "balance": (*BALANCE_LOSSES, "none"),
}
NOT_NEGATIVE = (
    "num_null_experts", "router_noise", "balance_loss_weight", "z_loss_weight", "image_side",
    "shared_expert_intermediate_size",
)  # fmt: skip
# What transformers takes besides the names that it keeps.
TAKEN = ("attn_implementation", "experts_implementation", "torch_dtype", "num_labels", "rope_theta", "rope_scaling",
         "partial_rotary_factor", "quantization_config", "auto_map", "name_or_path")  # fmt: skip


class MomaConfig(LlamaConfig):
    """Llama's fields, the tokens of pictures, and how FFNs are divided into experts.

    Each expert has the full `intermediate_size`, and a token meets one expert on average, so that models of one shape
    cost the same whatever their groups. Raises UserError for values that do not go together.

    Args:
        codebook_size: number of image codes. A token is an image token if its id is in
            [image_token_start, image_token_start + codebook_size), else text; the two markers are text.
        image_token_start: id of the first image code. None: the codes are the last ids of the vocabulary.
        begin_image_token_id, end_image_token_id: markers around a picture, for those who write and read sequences.
        image_side: tokens a side of a picture, for embeddings of an image token's row and column, added to its own
            (as in DALL·E, 2102.12092; Chameleon and MoMa have none). 0: none.
        expert_groups: {"all": 1} is dense, {"all": 8} mixed, {"text": 4, "image": 4} split by modality, with "shared"
            experts open to both (as in MoIIE, 2508.09779). See `preset`.
        routing: "expert_choice", each expert takes its share of the batch's tokens by a sigmoid score that also weighs
            its output, not renormalised (MoMa) · "token_choice", each token takes its most probable experts, which is
            causal as it stands.
        causal_routing: how experts choose when not training, where a token may not depend on later ones: "threshold",
            all tokens whose score passes a running mean of the training batches' cut-off · "aux", those that trained
            auxiliary routers predict (see `MomaForCausalLM.begin_auxiliary_stage`, which sets this).
        threshold_momentum: weight of the past in that running mean.
        choice_batch: what expert choice means by the batch under data parallelism: "rank", the rank's own micro-batch,
            or "global", the micro-batches of all ranks, which must then run forward together.
        router_noise: τ of Gumbel-sigmoid noise on expert choice in training: score = σ(logit + τ(G' - G'')). MoMa uses
            it after upcycling, to tell copied experts apart.
        num_experts_per_tok, num_null_experts, null_logits, real_share, null_balance, balance, balance_loss_weight,
            z_loss_weight: of token choice, as in MoleConfig (there `top_k`). With null experts, a shared logit,
            real_share ρ and a shared expert this is the form of 2601.15370.
        shared_expert_intermediate_size: width of a further FFN that every token passes, beside the routed ones.
        norm_position: "post", x + norm(Σ g FFN(x)), as Chameleon and MoMa have it. The norm cancels the gate of a token
            that met one expert only; its router learns from tokens that met several · "expert", x + Σ g norm(FFN(x)),
            where every gate counts · "pre", x + Σ g FFN(norm(x)), for weights of an ordinary language model.
        mixture_of_depths: share of the batch's tokens that every other layer, from the first on, works on; the others
            pass it by (MoD, 2404.02258). None: every layer works on all. `layers_at_equal_flops` makes up for it.
    """

    model_type = "moma"
    base_model_tp_plan = None

    vocab_size: int = 65536
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    max_position_embeddings: int = 4096

    codebook_size: int = 8192
    image_token_start: int | None = None
    begin_image_token_id: int | None = None
    end_image_token_id: int | None = None
    image_side: int = 0

    expert_groups: dict[str, int] | None = None
    routing: str = "expert_choice"
    causal_routing: str = "threshold"
    threshold_momentum: float = 0.99
    choice_batch: str = "rank"
    router_noise: float = 0.0

    num_experts_per_tok: int = 1
    num_null_experts: int = 0
    null_logits: str = "shared"
    real_share: float | None = None
    null_balance: str = "averaged"
    balance: str = "global_batch"
    balance_loss_weight: float = 0.01
    z_loss_weight: float = 0.0

    shared_expert_intermediate_size: int = 0
    norm_position: str = "post"
    mixture_of_depths: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.image_token_start is None:
            self.image_token_start = self.vocab_size - self.codebook_size
        self.expert_groups = dict(self.expert_groups or {ALL: 1})
        self._check()

    @classmethod
    def preset(cls, name: str, **fields: Any) -> MomaConfig:
        """The paper's names: "dense", "8x" (mixed), "1t1i", "4t4i", "6t2i" …, and "2t2i1s" with a shared expert.

        Raises UserError for a name of another form, and for a field that there is not.
        """
        refuse_unknown(fields)
        if name == "dense":
            return cls(expert_groups={ALL: 1}, **fields)
        if mixed := re.fullmatch(r"(\d+)x", name):
            return cls(expert_groups={ALL: int(mixed[1])}, **fields)
        if split := re.fullmatch(r"(\d+)t(\d+)i(?:(\d+)s)?", name):
            text, image, shared = (int(size or 0) for size in split.groups())
            return cls(expert_groups={"text": text, "image": image, "shared": shared}, **fields)
        raise UserError(f"No preset {name!r}; write dense, 8x, 4t4i or 2t2i1s, with any numbers.")

    @property
    def layout(self) -> ExpertLayout:
        """The experts a router chooses among."""
        if ALL in self.expert_groups:
            return ExpertLayout.of(self.expert_groups[ALL], None, self.num_null_experts)
        return ExpertLayout.of(0, self.expert_groups, self.num_null_experts)

    @property
    def target(self) -> Target:
        """What balance of token choice aims at."""
        return Target.of(self.layout, self.real_share, self.null_balance)

    @property
    def is_dense(self) -> bool:
        """One expert for all: a plain FFN without a router."""
        return self.expert_groups == {ALL: 1}

    @property
    def is_modal(self) -> bool:
        """One expert a token and no router to ask which: dense, or one for each modality."""
        sizes = {name: size for name, size in self.expert_groups.items() if size}
        return self.num_null_experts == 0 and sizes in ({ALL: 1}, dict.fromkeys(MODALITIES, 1))

    @property
    def chooses_over_batch(self) -> bool:
        """Whether training lets experts or layers choose among tokens, which is not causal."""
        return self.mixture_of_depths is not None or (self.routing == "expert_choice" and not self.is_modal)

    def has_depth_router(self, layer: int) -> bool:
        """Whether the layer of that number works on some tokens only: every other one, from the first on."""
        return self.mixture_of_depths is not None and layer % 2 == 0

    def _check(self) -> None:
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise UserError(f"{field}={getattr(self, field)!r} is not known; choose one of {', '.join(known)}.")
        self._check_values()
        if ALL in self.expert_groups and (len(self.expert_groups) > 1 or self.expert_groups[ALL] < 1):
            raise UserError(f"expert_groups={self.expert_groups}: 'all' stands alone, with at least one expert.")
        fewest = int(self.layout.allowed_PX.sum(1).min())  # asking for the layout checks the groups
        if not 0 <= self.image_token_start <= self.vocab_size - self.codebook_size:
            raise UserError(
                f"Image codes {self.image_token_start} .. {self.image_token_start + self.codebook_size - 1} do not fit "
                f"a vocabulary of {self.vocab_size}; raise vocab_size or lower codebook_size."
            )
        if self.image_side and self.begin_image_token_id is None:
            raise UserError(f"image_side={self.image_side} counts from the begin of a picture: give its token's id.")
        if self.mixture_of_depths is not None and not 0 < self.mixture_of_depths < 1:
            raise UserError(f"mixture_of_depths is a share between 0 and 1, got {self.mixture_of_depths}.")
        if self.is_dense and self.shared_expert_intermediate_size:
            raise UserError("A dense model has nothing beside its FFN; raise intermediate_size, or give more experts.")
        if self.routing == "token_choice":
            self._check_token_choice(fewest)
        elif self.num_null_experts or self.num_experts_per_tok != 1:
            raise UserError(
                f"num_null_experts={self.num_null_experts} and num_experts_per_tok={self.num_experts_per_tok} belong "
                'to tokens that choose: set routing="token_choice".'
            )

    def _check_values(self) -> None:
        for field in NOT_NEGATIVE:
            value = getattr(self, field)
            parts = value.values() if field == "num_null_experts" and isinstance(value, dict) else [value]
            if not all(isinstance(part, int | float) and part >= 0 for part in parts):
                raise UserError(f"{field} must be a number from 0 on, got {value!r}.")
        if not 0 <= self.threshold_momentum < 1:
            raise UserError(f"threshold_momentum must be in [0, 1), got {self.threshold_momentum}.")
        if self.real_share is not None and not (0 < self.real_share <= 1 and self.num_null_experts):
            raise UserError(
                f"real_share={self.real_share} is the share of picks, in (0, 1], that are not null experts: with "
                f"num_null_experts={self.num_null_experts} it must be {'such' if self.num_null_experts else 'None'}."
            )

    def _check_token_choice(self, fewest: int) -> None:
        if self.mixture_of_depths is not None or self.causal_routing == "aux" or self.router_noise:
            raise UserError(
                'mixture_of_depths, causal_routing="aux" and router_noise go with routing="expert_choice": with '
                "token_choice the balance loss would count tokens that no layer worked on, and causal it is already. "
                "Leave them out (router_noise=0)."
            )
        if not 1 <= self.num_experts_per_tok <= fewest:
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok}, but some tokens choose among {fewest} experts."
            )
        gate_is_lost = self.norm_position == "post" and not self.shared_expert_intermediate_size
        if self.num_experts_per_tok == 1 and gate_is_lost and not self.is_modal:
            raise UserError(
                'num_experts_per_tok=1 with norm_position="post": the norm cancels the gate of a lone pick, so the '
                'router would learn nothing from the task. Set norm_position="expert" or "pre", or more picks.'
            )


def refuse_unknown(fields: Iterable[str]) -> None:
    """Raises UserError for the name of a field that MomaConfig does not have: transformers would take it silently."""
    known = [*MomaConfig().to_dict(), *TAKEN]
    for name in fields:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            raise UserError(f"MomaConfig has no field {name!r}{f'; did you mean {near[0]}?' if near else '.'}")


def layers_at_equal_flops(num_layers: int, mixture_of_depths: float) -> int:
    """Layers a model with mixture of depths needs to cost at least what `num_layers` full ones cost; an even number.

    8 and 24 layers at a share of 1/4 become 14 and 40, as in MoMa's table of models.
    """
    return 2 * math.ceil(num_layers / (1 + mixture_of_depths))
