"""What routing asks of a training loop, in one object; and the same for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm.mole.model import BiasBalance, routing_loss
from mllm.routing import BalanceWindow, routing_context


class RoutingObjective:
    """The routing losses of a loop of your own, and what balance does between its steps.

    Call `loss()` after each training forward, and `step()` after each optimizer step. It does what the model's
    MoleConfig asks: balance over all micro-batches and ranks of a step, a weight that changes over the run, z and
    domain losses, or a bias on the choice (balance="bias"). For a model without MOLE it adds nothing. All ranks must
    call it together.

    Attributes:
        parts: the last forward's losses by name, unweighted and detached.
        progress: share of the steps that are done, in [0, 1].

    Example:
        >>> import torch, mllm, peft
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> model = peft.get_peft_model(base, mllm.MoleConfig(r=2, num_experts=3))
        >>> objective, ids = mllm.RoutingObjective(model, steps=1), torch.ones(2, 5, dtype=torch.long)
        >>> loss = model(input_ids=ids, labels=ids).loss + objective.loss()
        >>> loss.backward()
        >>> objective.step()
        >>> sorted(objective.parts), objective.progress
        (['balance_loss'], 1.0)
    """

    def __init__(self, model: nn.Module, steps: int | None = None) -> None:
        """`steps`: optimizer steps of the whole run, for weights that change over it; None: they stay as they begin."""
        self.model, self.steps = model, steps
        self.context, self.bias, self.window = routing_context(model), BiasBalance(model), BalanceWindow()
        self.parts: dict[str, Tensor] = {}
        self.done = 0

    @property
    def progress(self) -> float:
        return min(1.0, self.done / self.steps) if self.steps else 0.0

    def set_domains(self, domains: Sequence[str] | None) -> None:
        """Tell the domain of each row of the next batch, before its forward; routers that go by it need that."""
        if self.context is not None:
            self.context.set_domains(domains)

    def loss(self) -> Tensor | float:
        """The last forward's weighted routing losses, a scalar to be added to the task's loss. Call it once a forward.

        Raises UserError where the model has run no forward, and for a domain that no expert is meant for.
        """
        if self.context is None:
            return 0.0
        self.bias.count()
        loss, self.parts = routing_loss(self.model, window=self.window, progress=self.progress)
        return loss

    def step(self) -> None:
        """An optimizer step has been made: move biases and begin to count anew."""
        self.begin_step(self.done + 1)
        self.bias.move()

    def begin_step(self, done: int) -> None:
        """`done` steps have been made, so count anew; for loops that count steps themselves."""
        self.done = done
        self.window.reset()


class RoutingLossMixin:
    """Before transformers' Trainer, or a subclass, it adds the routing losses of a model with MOLE to the task's loss.

    Evaluation is left alone. Where rows have domains, give Trainer a dataset with a column `domain`, a
    data collator that keeps it as a list `domains`, and remove_unused_columns=False.

    Example:
        >>> import mllm, transformers
        >>> class Trainer(mllm.RoutingLossMixin, transformers.Trainer): ...
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.routing_objective = RoutingObjective(self.model)
        self.add_callback(_Steps(self.routing_objective))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Any]:
        """Trainer's own, and while training the routing losses: a step's is the mean over its micro-batches."""
        inputs = dict(inputs)
        self.routing_objective.set_domains(inputs.pop("domains", None))
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if model.training:
            share = self.current_gradient_accumulation_steps if self._is_whole(num_items_in_batch) else 1
            loss = loss + self.routing_objective.loss() / share
        return (loss, outputs) if return_outputs else loss

    def _is_whole(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether losses are shares of the step's already: Trainer then does not divide by its micro-batches."""
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None


class _Steps(TrainerCallback):
    """Tells a RoutingObjective where Trainer's steps begin and end."""

    def __init__(self, objective: RoutingObjective) -> None:
        self.objective = objective

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.objective.steps = state.max_steps
        self.objective.begin_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.objective.bias.move()  # before Trainer saves, so that a checkpoint holds the bias of its step
