"""MoleModel: PEFT's tuner for MOLE, and how to reach a model's routing from outside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from mllm.common.errors import UserError
from mllm.common.names import check_names
from mllm.mole.config import MoleConfig
from mllm.mole.layer import MoleBlock, MoleLayer, MoleLinear
from mllm.mole.targets import Targets, find_targets
from mllm.routing import BALANCE_LOSSES, BalanceWindow, RoutingContext, find_router, z_loss
from mllm.routing.losses import domain_loss, moved_selection_bias, over_ranks, pool, scheduled

PROJECTOR = "multi_modal_projector"


class MoleModel(BaseTuner):
    """Puts sparse LoRA experts into the MLP blocks of a language model and plain LoRA into its attention.

    Made by `peft.get_peft_model(model, MoleConfig(...))` or `PeftModel.from_pretrained`; the model may be a causal
    language model or hold one beside a vision tower, which is left alone. Raises UserError for a second adapter, for
    merging, and for models without a block to route (see `mllm.mole.targets`).
    """

    prefix = "mole_"
    tuner_layer_cls = MoleLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _pre_injection_hook(self, model: nn.Module, config: MoleConfig, adapter_name: str) -> None:
        self._routing_context = RoutingContext(_image_token_id(model))

    def _post_injection_hook(self, model: nn.Module, config: MoleConfig, adapter_name: str) -> None:
        remembers = config.router_reads in ("picture", "both")
        if hasattr(model, "get_image_features"):
            remembers = remembers or find_router(config.router).counts_patches
        self._routing_context.attach(model, remembers=remembers, has_losses=config.has_losses)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, with a routing context for what is put in. Raises UserError for a model with an adapter."""
        remove_deleted(model)
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            if len(self.peft_config) > 1:  # the model's own, shared with the first adapter: it stays as it was
                del self.peft_config[adapter_name]
            raise UserError(
                "The model carries an adapter already, and MOLE holds one adapter a model: two would route the same "
                "tokens by two routers. Load the second one into a fresh copy of the base model."
            )
        self.active_adapter = adapter_name  # none is, where the last one was deleted
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Without the adapter's name right behind our own: PEFT looks near the end, but a router lies deeper."""
        return re.sub(rf"(\.{cls.prefix}[^.]*)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key, count=1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoleConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # Adapters of earlier releases have routers with the name still in them.
        named = re.compile(r"(\.mole_router)\.[^.]+(?=\.(?:router\.|selection_bias$))")
        state_dict = {named.sub(r"\1", key): tensor for key, tensor in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _prepare_adapter_config(self, peft_config: MoleConfig, model_config: dict) -> MoleConfig:
        # PEFT looks targets up in a table by model type and refuses families it does not list.
        return peft_config  # what to adapt is found in the module tree, see _prepare_model

    def _prepare_model(self, peft_config: MoleConfig, model: nn.Module) -> None:
        self._targets: Targets = find_targets(model, peft_config)
        if peft_config.modules_to_save is None and any(
            name.rpartition(".")[2] == PROJECTOR for name, _ in model.named_modules()
        ):
            peft_config.modules_to_save = [PROJECTOR]
        names = [name for name, _ in model.named_modules()]
        check_names("MoleConfig.modules_to_save", peft_config.modules_to_save, names, where="module of the model")
        has_pictures = _image_token_id(model) is not None and hasattr(model, "get_image_features")
        if peft_config.router_reads is None:
            reads_both = has_pictures and peft_config.router_input == "block" and peft_config.learns
            peft_config.router_reads = "both" if reads_both else "token"
        if peft_config.router_reads != "token" and not has_pictures:
            raise UserError(
                f"MoleConfig.router_reads={peft_config.router_reads!r}, but {type(model).__name__} takes no pictures; "
                "set it to 'token'."
            )

    def _check_target_module_exists(self, peft_config: MoleConfig, key: str) -> bool:
        targets = self._targets
        return key in targets.blocks or key in targets.routed_linears or key in targets.linears

    def _create_and_replace(
        self,
        peft_config: MoleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        targets, context = self._targets, self._routing_context
        if current_key in targets.blocks:
            layer = targets.blocks[current_key]
            new_module: MoleLayer = MoleBlock(target, adapter_name, peft_config, context, layer)
        elif current_key in targets.routed_linears:
            layer = targets.routed_linears[current_key]
            new_module = MoleLinear(target, adapter_name, peft_config, context=context, layer=layer)
        else:
            new_module = MoleLinear(target, adapter_name, peft_config)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # the layers have put their weights on the right device themselves

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager:
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "adapter_names= asks for an adapter a row, but MOLE holds one a model. Load each adapter into a copy "
                "of the base model, or call without adapter_names."
            )
        return nullcontext()

    def _check_merge_allowed(self) -> None:
        MoleLayer.merge(self)

    def unload(self) -> nn.Module:
        """The base model without anything of MOLE, its own modules back in place."""
        self._routing_context.detach(self.model)
        return super().unload()


def remove_deleted(model: nn.Module) -> None:
    """Puts a model's own modules back where `delete_adapter` left MOLE's layers without an adapter."""
    for name, module in reversed(list(model.named_modules())):  # linears before the block around them
        is_ours = isinstance(module, MoleLayer)
        if not is_ours or module.mole_router or getattr(module, "mole_experts", None):
            continue
        if module.layer is not None:
            module.routing_context.detach(model)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.base_layer)


def _image_token_id(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "image_token_id", None)


def routed_modules(model: nn.Module) -> Iterator[MoleBlock | MoleLinear]:
    """The modules that hold a router."""
    return (module for module in model.modules() if isinstance(module, MoleLayer) and module.layer is not None)


def routing_loss(
    model: nn.Module, *, window: BalanceWindow | None = None, progress: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """What this thread's last forward adds to the task loss. `RoutingObjective` does this and all that belongs to it.

    Returns the weighted sum, a scalar, and its parts, {"balance_loss": …, "z_loss": …}, unweighted and detached.
    Losses with weight 0 and balance "none" and "bias" are left out. Padding does not count, every other token does.
    Zero and {} where there is nothing to add: a model without MOLE, a disabled adapter, no loss with a weight.
    With balance="global_batch" all ranks must call it together.

    Args:
        window: the picks of the optimizer step so far, for balance="global_batch"; reset it after each step. None: the
            step is this forward.
        progress: share of training that is done, in [0, 1], for a scheduled weight.

    Raises UserError for a model with MOLE that has run no forward yet, and for a domain that no expert is meant for.

    Example:
        >>> import torch, mllm, peft
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> model = peft.get_peft_model(base, mllm.MoleConfig(r=2, num_experts=3))
        >>> ids = torch.ones(2, 5, dtype=torch.long)
        >>> loss = model(input_ids=ids, labels=ids).loss + mllm.routing_loss(model)[0]
        >>> loss.shape, list(mllm.routing_loss(model)[1])
        (torch.Size([]), ['balance_loss'])
    """
    module = next(routed_modules(model), None)
    if module is None:
        return torch.zeros(()), {}
    context, config = module.routing_context, module.config
    if context.forward is None:
        raise UserError("routing_loss reads the last forward, and the model has run none: call the model first.")
    context.mark_read()
    if not context.routings:
        return torch.zeros((), device=context.sample_T.device), {}
    weighted, losses = [], {}
    weight = scheduled(config.balance_loss_weight, config.balance_final_weight, config.balance_schedule, progress)
    if config.balances_by_loss:
        options = {"window": window} if config.balance == "global_batch" else {}
        losses["balance_loss"] = BALANCE_LOSSES[config.balance](
            router_probs_LTX=context.stack("router_probs_TX"),
            picks_LTX=context.stack("picks_TX"),
            is_counted_T=~context.is_pad_T,
            sample_T=context.sample_T,
            population_T=_population(config, context),
            target=config.target,
            **options,
        )
        weighted.append(weight * losses["balance_loss"])
    if config.teaches_domains and context.knows_domains:
        logits_LTX = context.stack("router_logits_TX")
        losses["domain_loss"] = domain_loss(
            router_logits_LTX=logits_LTX, is_due_TE=_due_experts(config, context), is_counted_T=~context.is_pad_T
        )
        weighted.append(config.domain_loss_weight * losses["domain_loss"])
    if config.z_loss_weight > 0:
        logits_LTX = context.stack("router_logits_TX")
        losses["z_loss"] = z_loss(router_logits_LTX=logits_LTX, is_counted_T=~context.is_pad_T)
        weighted.append(config.z_loss_weight * losses["z_loss"])
    total = sum(weighted) if weighted else torch.zeros((), device=context.sample_T.device)
    return total, {name: loss.detach() for name, loss in losses.items()}


def _population(config: MoleConfig, context: RoutingContext) -> Tensor:
    """[T] int64: with groups a token's modality, else 0."""
    return context.modality_T if config.layout.is_grouped else torch.zeros_like(context.sample_T)


def _due_experts(config: MoleConfig, context: RoutingContext) -> Tensor:
    """bool [T, E] the experts that a token's domain is due."""
    due_PDE = config.layout.due_PDE(len(config.expert_domains)).to(context.sample_T.device)
    return due_PDE[_population(config, context), context.domain_T(config.expert_domains)]


@dataclass
class BiasCounts:
    """Picks of the step so far, of layers in running order, which need not be that of the modules."""

    window: BalanceWindow = field(default_factory=BalanceWindow)
    layers: list[str] = field(default_factory=list)


class BiasBalance:
    """Loss-free balance (2408.15664) of a model with balance="bias": count after every forward, move once a step.

    The counts belong to the model, so any two objects for it are the same. All ranks must call both methods together.
    Does nothing for other models. `RoutingObjective` calls both where they are due.

    Example:
        >>> import torch, mllm, peft
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> model = peft.get_peft_model(base, mllm.MoleConfig(r=2, num_experts=3, balance="bias"))
        >>> output = model(input_ids=torch.ones(2, 5, dtype=torch.long))
        >>> mllm.BiasBalance(model).count()  # after each forward
        >>> mllm.BiasBalance(model).move()  # after the optimizer's step
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [module for module in routed_modules(model) if module.config.balance == "bias"]
        self.context = self.modules[0].routing_context if self.modules else None

    @property
    def counts(self) -> BiasCounts:
        """Of the model."""
        self.context.bias_counts = self.context.bias_counts or BiasCounts()
        return self.context.bias_counts

    @torch.no_grad()
    def count(self) -> None:
        """Add the picks of the last forward."""
        if not self.modules or not self.context.routings:
            return
        config, context = self.modules[0].config, self.context
        context.mark_read()
        self.counts.layers, populations = context.layers, len(config.target.share_PX)
        counts_LPX = pool(context.stack("picks_TX"), _population(config, context), populations, ~context.is_pad_T)
        self.counts.window.add(over_ranks(counts_LPX, ~context.is_pad_T)[0])

    @torch.no_grad()
    def move(self) -> None:
        """Move every router's bias towards its target and begin a new step; nothing where nobody has counted."""
        if not self.modules or self.counts.window.counts_LPX is None:
            return
        for module in self.modules:
            counts_PX = self.counts.window.counts_LPX[self.counts.layers.index(module.layer)]
            (router,) = module.mole_router.values()
            config, bias_X = module.config, router.selection_bias
            counts_PX = counts_PX.to(bias_X.device)
            bias_X.copy_(moved_selection_bias(bias_X, counts_PX, config.target, config.bias_update_rate))
        self.counts.window.reset()
