"""MoleModel: PEFT's tuner for MOLE, and how to reach a model's routing from outside."""

from __future__ import annotations

from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from mllm.errors import UserError
from mllm.mole.config import MoleConfig
from mllm.mole.layer import MoleBlock, MoleLayer, MoleLinear
from mllm.mole.targets import Targets, find_targets
from mllm.routing import BALANCE_LOSSES, RoutingContext, z_loss

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
        self.routing_context = RoutingContext(_image_token_id(model))

    def _post_injection_hook(self, model: nn.Module, config: MoleConfig, adapter_name: str) -> None:
        self.routing_context.attach(model)

    def _check_new_adapter_config(self, config: MoleConfig) -> None:
        if len(self.peft_config) > 1:
            raise UserError(
                "MOLE holds one adapter a model: two adapters would route the same tokens by two routers. Load the "
                "second one into a fresh copy of the base model."
            )

    def _prepare_adapter_config(self, peft_config: MoleConfig, model_config: dict) -> MoleConfig:
        return peft_config  # what to adapt is found in the module tree, see _prepare_model

    def _prepare_model(self, peft_config: MoleConfig, model: nn.Module) -> None:
        self._targets: Targets = find_targets(model, peft_config)
        if peft_config.modules_to_save is None and any(
            name.rpartition(".")[2] == PROJECTOR for name, _ in model.named_modules()
        ):
            peft_config.modules_to_save = [PROJECTOR]

    def _check_target_module_exists(self, peft_config: MoleConfig, key: str) -> bool:
        return key in self._targets.blocks or key in self._targets.linears

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
        if current_key in self._targets.blocks:
            layer = self._targets.blocks[current_key]
            new_module = MoleBlock(target, adapter_name, peft_config, self.routing_context, layer)
        else:
            new_module = MoleLinear(target, adapter_name, peft_config, slot=None)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # the layers have put their weights on the right device themselves

    def _check_merge_allowed(self) -> None:
        MoleLayer.merge(self)

    def unload(self) -> nn.Module:
        """The base model without anything of MOLE, its own modules back in place."""
        self.routing_context.detach()
        return super().unload()


def _image_token_id(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "image_token_id", None)


def _first_block(model: nn.Module) -> MoleBlock | None:
    return next((module for module in model.modules() if isinstance(module, MoleBlock)), None)


def routing_context(model: nn.Module) -> RoutingContext | None:
    """The RoutingContext of a model with MOLE, however wrapped (PEFT, DeepSpeed, DDP); None for a model without."""
    block = _first_block(model)
    return None if block is None else block.routing_context


def routing_loss(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]] | None:
    """What the last forward's routing adds to the task loss.

    Returns the weighted sum and its parts, {"balance_loss": …, "z_loss": …}, unweighted and detached.
    Losses with weight 0 and balance "none" are left out. Padding does not count, every other token does. None where
    there is nothing to add: a model without MOLE, a disabled adapter, no forward yet, no loss with a weight. With
    balance="global_batch" all ranks must call it together.
    """
    block = _first_block(model)
    if block is None or not block.routing_context.routings:
        return None
    context, config = block.routing_context, block.config
    is_counted_T = ~context.is_pad_T
    total, losses = None, {}
    if config.balance != "none" and config.balance_loss_weight > 0:
        losses["balance_loss"] = BALANCE_LOSSES[config.balance](
            router_probs_LTX=context.stack("router_probs_TX"),
            expert_ids_LTK=context.stack("expert_ids_TK"),
            is_counted_T=is_counted_T,
            sample_T=context.sample_T,
        )
        total = config.balance_loss_weight * losses["balance_loss"]
    if config.z_loss_weight > 0:
        losses["z_loss"] = z_loss(router_logits_LTX=context.stack("router_logits_TX"), is_counted_T=is_counted_T)
        weighted = config.z_loss_weight * losses["z_loss"]
        total = weighted if total is None else total + weighted
    if total is None:
        return None
    return total, {name: loss.detach() for name, loss in losses.items()}
