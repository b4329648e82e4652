"""MoleConfig: what the PEFT method MOLE needs to know."""

from __future__ import annotations

from dataclasses import dataclass

from peft.config import PeftConfig

from mllm.errors import UserError
from mllm.routing import BALANCE_LOSSES, GATES

PEFT_TYPE = "MOLE"
BALANCES = (*BALANCE_LOSSES, "none")


@dataclass(kw_only=True)
class MoleConfig(PeftConfig):
    """Sparse LoRA experts on the MLP blocks of a language model, plain LoRA beside them (LLaVA-MoLE, 2401.16160).

    In every expert block one router decides once for each token, from the block's input; all linears of the block
    follow it: y_t = W x_t + (lora_alpha / r) · Σ_k g_k B_k A_k dropout(x_t).

    Args:
        r: rank of one expert, and of the plain LoRA.
        lora_alpha: experts and LoRA are scaled by lora_alpha / r.
        lora_dropout: probability of dropping an input feature of an expert or LoRA.
        num_experts: E, experts a block.
        top_k: K, experts a token takes; each adds its output.
        gate: how a pick's weight enters the output: "straight_through" (1 forward, gradient of p), "softmax" (p),
            "none" (1, the router gets no task gradient; as released). See `mllm.routing.route`.
        balance: what is kept even: "global_batch" (counts over all ranks), "layer" (this rank's batch), "sample" (as
            LLaVA-MoLE released it), "none". See `mllm.routing.losses`.
        balance_loss_weight: weight of that loss.
        z_loss_weight: weight of the mean squared logsumexp of the router's logits.
        expert_modules: blocks that carry experts, always inside the language model where the model has one. None: its
            MLP blocks; a list of name endings; or a regular expression for the whole name.
        target_modules: linears that carry plain LoRA, found likewise. None: the attention projections; [] for none.
        modules_to_save: modules trained in full and saved with the adapter. None: the multi_modal_projector where the
            model has one; [] for none.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    num_experts: int = 4
    top_k: int = 1
    gate: str = "straight_through"
    balance: str = "global_batch"
    balance_loss_weight: float = 0.01
    z_loss_weight: float = 0.0
    expert_modules: list[str] | str | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("r", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise UserError(f"MoleConfig.{name} must be at least 1, got {getattr(self, name)}.")
        if self.top_k > self.num_experts:
            raise UserError(
                f"MoleConfig.top_k={self.top_k} exceeds num_experts={self.num_experts}: a token cannot take more "
                "experts than there are."
            )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"MoleConfig.lora_dropout must be in [0, 1), got {self.lora_dropout}.")
        for name in ("balance_loss_weight", "z_loss_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"MoleConfig.{name} must not be negative, got {getattr(self, name)}.")
        for name, choices in (("gate", tuple(GATES)), ("balance", BALANCES)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"MoleConfig.{name}={getattr(self, name)!r} is not known; choose one of {', '.join(choices)}."
                )
        if self.target_modules == "all-linear":
            raise UserError(
                'MoleConfig.target_modules="all-linear" would put plain LoRA on the linears that carry experts. Leave '
                "it None for the attention projections, or name the modules."
            )

    @property
    def scaling(self) -> float:
        """lora_alpha / r."""
        return self.lora_alpha / self.r
