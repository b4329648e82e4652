"""Null experts for language models that are mixtures of experts already (AdaMoE, 2406.13233).

Only the router is replaced, never the experts: transformers' expert functions skip an index equal to the number of
experts once the experts module expects it, so a null pick is that index, and costs nothing under "eager" and
"grouped_mm". ("batched_mm" computes the pick and drops it: it is made for decoding.)

    >>> import torch
    >>> from transformers import OlmoeConfig, OlmoeForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = OlmoeForCausalLM(OlmoeConfig(vocab_size=64, num_experts=4, num_experts_per_tok=2, **sizes))
    >>> context = add_null_experts(model, num_null_experts=4, top_k=3)
    >>> ids = torch.ones(2, 5, dtype=torch.long)
    >>> loss = model(input_ids=ids, labels=ids).loss + 0.01 * balance_loss(model)
    >>> context.stack("router_probs_TX").shape  # layers, tokens, real and null experts
    torch.Size([1, 10, 8])

`save_null_experts(model, folder)` keeps them, and `load_null_experts(base, folder)` puts them back.

Order: the base, then null experts, then a PEFT adapter. LoRA may take "mlp.experts.gate_up_proj" and
"mlp.experts.down_proj" as `target_parameters`; `router_parameters(model)` are what router tuning trains. Not
`modules_to_save` for a router: PEFT would route by a copy that records nothing.

T = B·S tokens, D width, E real experts, m null experts, X = E + m (ids E .. X-1 are null), K picks, G groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm.bases.identity import weight_digest
from mllm.common.errors import UserError
from mllm.routing import BALANCE_LOSSES, BalanceWindow, ExpertLayout, Routing, RoutingContext, Target
from mllm.routing import routing_context as routing_context  # belongs to what a model with null experts can be asked

CONFIG_FILE = "null_experts.json"
WEIGHTS_FILE = "null_experts.safetensors"
CHOICES = {"null_logits": ("own", "shared"), "null_kind": ("zero", "identity"), "init": ("tile", "zero", "random")}


def _softmax(logits_TX: Tensor) -> Tensor:
    return logits_TX.softmax(-1, dtype=torch.float32)


@dataclass(frozen=True)
class Family:
    """What a family's own router does between logits and weights; done here likewise, so that nothing else changes.

    Weights have the logits' type unless `keeps_score_type`. `renormalizes` None goes by the family's own switch,
    norm_topk_prob. `group_top` > 0: experts stand in groups, a group's score is the sum of its best `group_top`, and
    only the best groups' experts can be chosen.
    """

    scores: Callable[[Tensor], Tensor] = _softmax
    fp32_logits: bool = False
    keeps_score_type: bool = False
    renormalizes: bool | None = None
    sorts: bool = True
    group_top: int = 0


FAMILIES = {
    "MixtralTopKRouter": Family(keeps_score_type=True, renormalizes=True),
    "OlmoeTopKRouter": Family(),
    "Qwen2MoeTopKRouter": Family(),
    "Qwen3MoeTopKRouter": Family(),
    "DeepseekV2TopkRouter": Family(
        fp32_logits=True, keeps_score_type=True, renormalizes=False, sorts=False, group_top=1
    ),
    "DeepseekV3TopkRouter": Family(torch.sigmoid, fp32_logits=True, keeps_score_type=True, sorts=False, group_top=2),
}


@dataclass(frozen=True)
class NullExpertsConfig:
    """What `add_null_experts` was asked for; its docstring says what the fields mean."""

    num_null_experts: int
    top_k: int
    null_logits: str
    null_kind: str
    renormalize: bool
    drop_share: float


class NullRouter(nn.Module):
    """Takes a family's router's place, with its call, its parameter `weight` and its arithmetic, and m null experts.

    The tokens' choice is handed to the model's RoutingContext as a Routing. Picks stand in the family's own order:
    DeepSeek's are not sorted. Where scores are sigmoids, `router_probs_TX` are the scores over their sum.
    """

    def __init__(
        self, router: nn.Module, config: NullExpertsConfig, null_weight: Tensor, context: RoutingContext, layer: str
    ) -> None:
        super().__init__()
        self.family, self.config, self.routing_context, self.layer = _family(router), config, context, layer
        self.base_fingerprint = weight_digest(router.weight)
        self.num_experts, self.top_k = router.num_experts, config.top_k
        self.scaling = getattr(router, "routed_scaling_factor", 1.0)
        self.num_groups, self.kept_groups = _groups(router)
        self.weight = router.weight
        has_nulls = config.num_null_experts > 0
        self.null_weight = nn.Parameter(null_weight, router.weight.requires_grad) if has_nulls else None
        self.register_buffer("e_score_correction_bias", getattr(router, "e_score_correction_bias", None))
        self.edit_logits: Callable[[Tensor], Tensor] | None = (
            None  # put between logits and choice, see alignment.mixing
        )
        self.train(router.training)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [..., D] -> router_logits [T, X], expert_weights [T, K], expert_ids [T, K] with E for every null."""
        logits_TX = self._logits(hidden.reshape(-1, self.weight.shape[1]))
        if self.edit_logits is not None:
            logits_TX = self.edit_logits(logits_TX)
        scores_TX = self.family.scores(logits_TX)
        ids_TK = self._choose(scores_TX)
        is_taken_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        if self.config.drop_share > 0:
            is_taken_TK = torch.rand(ids_TK.shape, device=ids_TK.device) >= self.config.drop_share
        weights_TK = self._weights(scores_TX.gather(1, ids_TK), ids_TK, is_taken_TK)
        if not self.family.keeps_score_type:
            weights_TK = weights_TK.to(logits_TX.dtype)
        routing = self._record(logits_TX, scores_TX, ids_TK, is_taken_TK, weights_TK)
        return logits_TX, weights_TK, ids_TK.where(routing.is_real_TK, self.num_experts)

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        dtype = torch.float32 if self.family.fp32_logits else hidden_TD.dtype
        hidden_TD = hidden_TD.to(dtype)
        logits_TE = F.linear(hidden_TD, self.weight.to(dtype))  # by itself: nulls do not change a bit of it
        if self.null_weight is None:
            return logits_TE
        null_logits = F.linear(hidden_TD, self.null_weight.to(dtype))
        return torch.cat([logits_TE, null_logits.expand(-1, self.config.num_null_experts)], dim=1)

    def _choose(self, scores_TX: Tensor) -> Tensor:
        """[T, K] ids of the best scores. Groups and the selection bias bear on real experts; nulls are open to all."""
        if self.e_score_correction_bias is not None:
            scores_TX = scores_TX + F.pad(self.e_score_correction_bias, (0, self.config.num_null_experts))
        if self.num_groups > 1:
            real_TE, null_TM = scores_TX.split([self.num_experts, self.config.num_null_experts], dim=1)
            groups_TGE = real_TE.unflatten(1, (self.num_groups, -1))
            group_scores_TG = groups_TGE.topk(self.family.group_top, dim=-1).values.sum(-1)
            kept_TG = group_scores_TG.topk(self.kept_groups, sorted=False).indices
            is_kept_TG1 = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(1, kept_TG, True)[..., None]
            scores_TX = torch.cat([groups_TGE.masked_fill(~is_kept_TG1, -torch.inf).flatten(1), null_TM], dim=1)
        return scores_TX.topk(self.top_k, dim=-1, sorted=self.family.sorts).indices

    def _weights(self, scores_TK: Tensor, ids_TK: Tensor, is_taken_TK: Tensor) -> Tensor:
        """Zero null picks weigh nothing and do not share in the sum; identity nulls do both (LongCat, 2509.01322)."""
        counts_TK = is_taken_TK
        if self.config.null_kind == "zero":
            counts_TK = counts_TK & (ids_TK < self.num_experts)
        weights_TK = scores_TK.masked_fill(~counts_TK, 0)
        if self.config.renormalize:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=1e-20)
        return weights_TK * self.scaling

    def _record(
        self, logits_TX: Tensor, scores_TX: Tensor, ids_TK: Tensor, is_taken_TK: Tensor, weights_TK: Tensor
    ) -> Routing:
        probs_TX = scores_TX.float()
        if self.family.scores is torch.sigmoid:
            probs_TX = F.normalize(probs_TX, p=1, dim=1)
        routing = Routing(logits_TX.float(), probs_TX, ids_TK, is_taken_TK, weights_TK.float(), self.num_experts)
        trainable = any(parameter.requires_grad for parameter in self.parameters())
        self.routing_context.record(self.layer, routing, trainable=trainable)
        return routing


# -- adding ------------------------------------------------------------------------------------------------------------


def add_null_experts(
    model: PreTrainedModel,
    *,
    num_null_experts: int,
    top_k: int | None = None,
    null_logits: str = "own",
    null_kind: str = "zero",
    init: str | None = None,
    renormalize: bool | None = None,
    drop_share: float = 0.0,
) -> RoutingContext:
    """Replace every router of a Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 or -V3 model, in place.

    The model may be a causal language model or a LLaVA that holds one. With num_null_experts=0 and the rest left alone
    it stays the same, bit for bit. Returns the model's RoutingContext.

    Args:
        num_null_experts: m, null experts beside the E real ones of each layer.
        top_k: K, picks a token; raise it with m to keep the load, K·E/(E+m) if routing is even. None: as it was.
        null_logits: "own", a row of weights for each null (AdaMoE), or "shared", one row for all (2601.15370).
        null_kind: "zero", a null pick adds nothing (AdaMoE), or "identity", it adds its weight times the block's input
            (LongCat-Flash, 2509.01322).
        init: of null rows. "tile", null i starts as real expert i mod E (AdaMoE as released) · "zero" · "random", as
            the family draws its routers. None: "tile" for own, "zero" for shared logits.
        renormalize: divide weights by the sum over the token's picks: its real picks with zero nulls (AdaMoE, Eq. 5),
            all of them with identity nulls. None: as the family does.
        drop_share: probability that a pick is left out at random: the control for null experts at equal load.

    Where weights are renormalised over real picks (Mixtral, Qwen3-MoE, DeepSeek-V3), and wherever scores are sigmoids,
    a zero null's logit enters no weight: its row learns from `balance_loss` alone, so do not leave that out.

    Raises UserError for a model without such routers, one that was changed already, adapters included, one whose
    weights are not whole in this process, and values that cannot be: with one renormalised pick every weight would be 1
    and the router learn nothing. From then on the model refuses
    output_router_logits: transformers' own loss would count the nulls as experts; use `balance_loss`.
    """
    _check_model(model)
    blocks = _moe_blocks(model)
    first = next(iter(blocks.values())).gate
    init = init or ("tile" if null_logits == "own" else "zero")
    config = NullExpertsConfig(
        num_null_experts=num_null_experts,
        top_k=first.top_k if top_k is None else top_k,
        null_logits=null_logits,
        null_kind=null_kind,
        renormalize=_renormalizes(first) if renormalize is None else renormalize,
        drop_share=drop_share,
    )
    _check_config(config, first, init)
    std = model.config.get_text_config().initializer_range
    context = RoutingContext(getattr(model.config, "image_token_id", None))
    for layer, block in blocks.items():
        null_weight = _null_rows(block.gate.weight.detach(), config, init, std)
        block.gate = NullRouter(block.gate, config, null_weight, context, layer)
        # Only under this flag do the eager and grouped functions skip an id of E, which is that of every null pick.
        block.experts._is_expert_parallel = num_null_experts > 0 or drop_share > 0  # transformers' word for "skip E"
        if null_kind == "identity" and num_null_experts:
            block.experts.register_forward_hook(_add_identity)
    model.get_decoder().register_forward_pre_hook(_refuse_router_logits, with_kwargs=True)
    context.attach(model)
    return context


def _null_rows(weight_ED: Tensor, config: NullExpertsConfig, init: str, std: float) -> Tensor:
    rows = min(1, config.num_null_experts) if config.null_logits == "shared" else config.num_null_experts
    if init == "tile":
        return weight_ED[torch.arange(rows, device=weight_ED.device) % len(weight_ED)]
    null_weight = weight_ED.new_zeros(rows, weight_ED.shape[1])
    return null_weight.normal_(std=std) if init == "random" else null_weight


def _add_identity(experts: nn.Module, args: tuple[Tensor, Tensor, Tensor], output_TD: Tensor) -> Tensor:
    """Forward hook of the experts: they skip null picks, whatever those weigh; this adds weight · input for them."""
    hidden_TD, ids_TK, weights_TK = args
    null_weight_T1 = weights_TK.masked_fill(ids_TK < experts.num_experts, 0).sum(1, keepdim=True)
    return output_TD + (null_weight_T1 * hidden_TD).to(output_TD.dtype)


def _refuse_router_logits(decoder: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_router_logits", getattr(decoder.config, "output_router_logits", False)):
        raise UserError(
            "output_router_logits=True was asked of a model with null experts. transformers' balance loss knows real "
            "experts only and would be silently wrong. Leave it off, and add mllm.mole.native_moe.balance_loss(model) "
            "to the loss; router logits are in routing_context(model).routings."
        )


# -- what can be changed, and what not ---------------------------------------------------------------------------------


def _family(router: nn.Module) -> Family:
    return FAMILIES[type(router).__name__]


def _renormalizes(router: nn.Module) -> bool:
    renormalizes = _family(router).renormalizes
    return router.norm_topk_prob if renormalizes is None else renormalizes


def _groups(router: nn.Module) -> tuple[int, int]:
    """(number of groups, groups kept); (1, 1) where groups play no part."""
    if _family(router).group_top == 0 or getattr(router, "topk_method", "") == "greedy":
        return 1, 1
    return router.num_group, router.topk_group


def _moe_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name inside the decoder -> block with a known router and the experts it feeds."""
    modules = dict(model.get_decoder().named_modules())
    blocks = {
        name.removesuffix(".gate"): modules[name.removesuffix(".gate")]
        for name, module in modules.items()
        if type(module).__name__ in FAMILIES
    }
    if not blocks:
        routers = sorted({type(m).__name__ for m in modules.values() if "router" in type(m).__name__.lower()})
        raise UserError(
            f"{type(model).__name__} has no router that null experts are known for: expected one of "
            f"{', '.join(FAMILIES)}, found {', '.join(routers) or 'none'}."
        )
    for name, block in blocks.items():
        if getattr(block.experts, "_is_expert_parallel", True):
            raise UserError(
                f"The experts of {name} ({type(block.experts).__name__}) cannot skip picks of this process: they are "
                "spread over ranks by transformers' expert parallelism, whose mark for absent experts null picks would "
                "use too, or this release of transformers does not have that mark (5.23 has). Load the model without "
                "expert parallelism."
            )
        if block.gate.weight.is_meta or len(block.gate.weight) != block.gate.num_experts:
            raise UserError(
                f"The router of {name} is not whole in this process (meta device, or a ZeRO-3 partition). Add null "
                "experts to a loaded model, before DeepSpeed divides it."
            )
    return blocks


def _check_model(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        raise UserError(
            "The model carries a PEFT adapter. Add null experts to the base first, then the adapter: get_peft_model or "
            "PeftModel.from_pretrained."
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"Null experts are added to a transformers model, got {type(model).__name__}.")
    if _routers(model):
        raise UserError("The model has null experts already; load the base model afresh to add others.")


def _check_config(config: NullExpertsConfig, router: nn.Module, init: str) -> None:
    for field, value in (("null_logits", config.null_logits), ("null_kind", config.null_kind), ("init", init)):
        if value not in CHOICES[field]:
            raise UserError(f"{field}={value!r} is not known; choose one of {', '.join(CHOICES[field])}.")
    if config.null_logits == "shared" and init == "tile":
        raise UserError('init="tile" copies one real row for each null, but shared logits have one row; use "zero".')
    if config.num_null_experts < 0:
        raise UserError(f"num_null_experts must not be negative, got {config.num_null_experts}.")
    if not 0 <= config.drop_share <= 1:
        raise UserError(f"drop_share is a probability, got {config.drop_share}.")
    num_groups, kept_groups = _groups(router)
    real = router.num_experts // num_groups * kept_groups
    if not 1 <= config.top_k <= real + config.num_null_experts:
        raise UserError(
            f"top_k={config.top_k} must be from 1 to {real + config.num_null_experts}: a token chooses among {real} "
            f"real and {config.num_null_experts} null experts."
        )
    is_as_it_was = config.num_null_experts == 0 and config.top_k == router.top_k and _renormalizes(router)
    if config.top_k == 1 and config.renormalize and not is_as_it_was:
        raise UserError(
            "top_k=1 with renormalised weights makes every weight 1: the router would get no gradient from the task. "
            f"Set top_k=2 or more, or renormalize=False ({type(router).__name__} renormalises by itself: "
            f"{_renormalizes(router)})."
        )


# -- what a model with null experts can be asked -----------------------------------------------------------------------


def _routers(model: nn.Module) -> dict[str, NullRouter]:
    """Layer -> router, however the model is wrapped (PEFT, DeepSpeed, DDP)."""
    return {module.layer: module for module in model.modules() if isinstance(module, NullRouter)}


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Real and null rows of every router, for training routers alone: freeze the model, then unfreeze these."""
    return [parameter for router in _routers(model).values() for parameter in router.parameters()]


def balance_loss(
    model: nn.Module,
    *,
    balance: str = "global_batch",
    null_balance: str = "averaged",
    real_share: float | None = None,
    window: BalanceWindow | None = None,
) -> Tensor:
    """The balance loss of the last forward over real and null experts, 1 when routing is on target; unweighted.

    balance: how picks are pooled, a name of `mllm.routing.BALANCE_LOSSES`; with "global_batch" all ranks must call it.
    null_balance: "averaged", the nulls' picks are averaged, so that the loss sets their share and not which of them is
        taken (AdaMoE, 2406.13233, Eq. 7, with f over K), or "each", which is what its released Mixtral code does: its
        averaging reaches nothing.
    real_share: share of picks that real experts should get (ρ of 2601.15370). None: E / (E + m).
    window: the picks of the optimizer step so far, for balance="global_batch"; reset it after each step. None: the step
        is this forward.

    Padding does not count. Raises UserError for a model without null experts, an unknown name, and when nothing was
    recorded: no forward yet, or a router copied by PEFT's modules_to_save.
    """
    routers = _routers(model)
    if not routers:
        raise UserError("balance_loss needs a model that went through add_null_experts.")
    if balance not in BALANCE_LOSSES or null_balance not in ("averaged", "each"):
        raise UserError(
            f"balance={balance!r}, null_balance={null_balance!r}: choose one of {', '.join(BALANCE_LOSSES)}, and "
            "'averaged' or 'each'."
        )
    router = next(iter(routers.values()))
    if real_share is not None and not (router.config.num_null_experts > 0 and 0 < real_share < 1):
        raise UserError(f"real_share={real_share} must lie between 0 and 1 and needs null experts; leave it None.")
    if window is not None and balance != "global_batch":
        raise UserError(f'window is for balance="global_batch", which pools the picks of a step; got {balance!r}.')
    context = router.routing_context
    if not context.routings:
        raise UserError(
            "No routing was recorded. Call the model first; and do not put a router into PEFT's modules_to_save, which "
            "routes by a copy: train router_parameters(model)."
        )
    layout = ExpertLayout.of(router.num_experts, num_null_experts=router.config.num_null_experts)
    return BALANCE_LOSSES[balance](
        router_probs_LTX=context.stack("router_probs_TX"),
        picks_LTX=context.stack("picks_TX"),
        is_counted_T=~context.is_pad_T,
        sample_T=context.sample_T,
        population_T=torch.zeros_like(context.sample_T),
        target=Target.of(layout, real_share, null_balance),
        **({} if window is None else {"window": window}),
    )


# -- saving and loading ------------------------------------------------------------------------------------------------


def save_null_experts(model: nn.Module, folder: str | Path) -> None:
    """Write the routers, real rows and null rows, and how they were made: a small adapter beside the base model.

    What else was trained is not in it: save a PEFT adapter by its own means. `PreTrainedModel.save_pretrained` keeps
    the null rows too, but `from_pretrained` would drop them.
    Raises UserError for a model without null experts.
    """
    routers = _routers(model)
    if not routers:
        raise UserError("The model has no null experts to save; they come with add_null_experts.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{layer}.{name}": tensor for layer, router in routers.items() for name, tensor in router.named_parameters()
    }
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    card = {
        "config": asdict(next(iter(routers.values())).config),
        "base": {layer: router.base_fingerprint for layer, router in routers.items()},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_null_experts(model: PreTrainedModel, folder: str | Path) -> RoutingContext:
    """Add to a base model, in place, the null experts that `save_null_experts` wrote. Returns its RoutingContext.

    Raises UserError where the folder holds none, where the model's routers are not those the null experts were added
    to, and as `add_null_experts` does; the model is then as it was.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; expected a folder written by save_null_experts.")
    card = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    _check_model(model)
    blocks = _moe_blocks(model)
    try:
        config, tensors = NullExpertsConfig(**card["config"]), load_file(folder / WEIGHTS_FILE)
        _check_base({layer: weight_digest(block.gate.weight) for layer, block in blocks.items()}, card["base"])
    except (KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read as save_null_experts wrote it: {error}") from error
    _check_tensors(folder, tensors, config, blocks)
    context = add_null_experts(model, init="zero", **card["config"])
    with torch.no_grad():
        for layer, router in _routers(model).items():
            for name, tensor in router.named_parameters():
                tensor.copy_(tensors[f"{layer}.{name}"])
    return context


def _check_tensors(
    folder: Path, tensors: dict[str, Tensor], config: NullExpertsConfig, blocks: dict[str, nn.Module]
) -> None:
    rows = min(1, config.num_null_experts) if config.null_logits == "shared" else config.num_null_experts
    due = {}
    for layer, block in blocks.items():
        due[f"{layer}.weight"] = list(block.gate.weight.shape)
        if rows:
            due[f"{layer}.null_weight"] = [rows, block.gate.weight.shape[1]]
    for name in due | tensors:
        found = list(tensors[name].shape) if name in tensors else "no such tensor"
        if name not in due or due[name] != found:
            raise UserError(
                f"{folder / WEIGHTS_FILE}: {name} should be {due.get(name, 'no part of it')} in this model, found "
                f"{found}. Take the folder as save_null_experts wrote it."
            )


def _check_base(came: dict[str, str], expected: dict[str, str]) -> None:
    if came.keys() != expected.keys():
        raise UserError(
            f"These null experts belong to a model with {len(expected)} routed layers ({next(iter(expected))} …), this "
            f"one has {len(came)} ({next(iter(came))} …). Load the base they were trained on."
        )
    other = [layer for layer in expected if came[layer] != expected[layer]]
    if other:
        raise UserError(
            f"These null experts belong to another base: the router of {other[0]} differs, and {len(other)} of "
            f"{len(expected)} in all. Load the base they were trained on, unchanged."
        )
