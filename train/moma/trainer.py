"""transformers' Trainer for the early-fusion model: its loss, and a log by direction of prediction.

B batch, S sequence, V vocabulary. Expert choice is over the micro-batch of one rank, or with choice_batch="global" over
that of all ranks; gradient accumulation never joins micro-batches, so micro_batch_size is a setting of the method here.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from mllm.common import ranks
from mllm.common.errors import UserError
from mllm.moma import MomaForCausalLM
from mllm.moma.processor import MomaProcessor
from mllm.moma.scoring import direction_sums
from mllm.moma.stream import DIRECTIONS, PackedRows
from mllm.routing import BalanceWindow, RoutingStats
from train.feed import RunOrder
from train.moma.config import MomaTrainConfig
from train.moma.model import MODEL, gather_model, write_model
from train.parts import parameter_groups
from train.trainer import GradientWatch, StageTrainer


class NewStep(TrainerCallback):
    """Empties the window over a step's micro-batches that balance is counted in."""

    def __init__(self, window: BalanceWindow) -> None:
        self.window = window

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.window.reset()


class MomaTrainer(StageTrainer):
    """Trains what `build_moma` set to train.

    The loss of a step is the mean over the predicted tokens of the whole global batch, plus the routing losses of token
    choice weighed the same; in stage train_causal_routers it is the auxiliary routers'.
    """

    train_dataset: PackedRows

    def __init__(
        self, *, config: MomaTrainConfig, processor: MomaProcessor, start: int, data_digest: str, **kwargs: Any
    ) -> None:
        """Besides Trainer's own arguments: settings, vocabulary, rows seen by an earlier stage, name of the data."""
        super().__init__(**kwargs)
        self.config, self.processor, self.start, self.data_digest = config, processor, start, data_digest
        self.model_accepts_loss_kwargs = True  # makes Trainer count a step's predicted tokens over all ranks
        self.core: MomaForCausalLM = self.model
        self.core.balance_window = BalanceWindow()
        self.add_callback(NewStep(self.core.balance_window))
        self.add_callback(GradientWatch(self.core, self.args.device))
        self._clear()

    def _clear(self) -> None:
        self.sums = torch.zeros(len(DIRECTIONS), 2, dtype=torch.float64)  # loss sum, tokens
        self.hits = torch.zeros(3, dtype=torch.float64)  # of auxiliary routers: right picks, their picks, the batch's
        self.stats = RoutingStats()
        self.tokens = 0
        self.since = time.monotonic()

    def get_train_dataloader(self) -> DataLoader:
        """The run's micro-batches for this rank as one epoch, so that Trainer's own skipping resumes exactly."""
        run = self.config.run
        order = RunOrder(
            self.train_dataset,
            seed=run.seed,
            steps=self.args.max_steps,
            batch_size=run.batch_size,
            micro_batch_size=run.micro_batch_size,
            rank=self.args.process_index,
            world=self.args.world_size,
            start=self.start,
        )
        return DataLoader(self.train_dataset, batch_sampler=order)  # rows lie in memory: no process need read them

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; `optim.part_lr` can give router, attention, experts, embeddings and other rates of their own."""
        if self.optimizer is None:
            optim = self.config.optim
            groups = parameter_groups(model or self.model, optim)
            self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """This micro-batch's share of the step's loss, times the number of ranks (DeepSpeed averages over ranks)."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss * self.args.world_size
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()}: lower optim.lr or optim.max_grad_norm, or set model.dtype=fp32."
            )
        self._count(inputs, outputs.logits.detach())
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _count(self, inputs: dict[str, Tensor], logits_BSV: Tensor) -> None:
        self.sums += direction_sums(logits_BSV, inputs["input_ids"], inputs["position_ids"], self.processor)
        self.tokens += inputs["input_ids"].numel()
        context = self.core.routing_context
        self.stats.update(context)
        for choice in context.choices.values():
            if choice.auxiliary_logits_TE is not None:
                picked, chosen = (choice.auxiliary_logits_TE > 0) & choice.is_open_TE, choice.is_chosen_TE
                self.hits += torch.stack([(picked & chosen).sum(), picked.sum(), chosen.sum()]).double().cpu()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was gathered since the last entry. All ranks call it together."""
        if self.tokens:
            logs |= self._drain()
        super().log(logs, start_time)

    def _drain(self) -> dict[str, float]:
        device = self.args.device
        sums = ranks.summed(self.sums.to(device)).cpu()
        # In training mode experts choose over the batch: these losses are leaky, and labelled so.
        leaky = "_leaky" if self.core.config.chooses_over_batch else ""
        entry = {
            f"loss{leaky}/{name}": (loss / tokens).item()
            for name, (loss, tokens) in zip(DIRECTIONS, sums, strict=True)
            if tokens
        }
        right, picked, chosen = ranks.summed(self.hits.to(device)).tolist()
        if chosen:
            entry |= {"auxiliary/precision": right / max(picked, 1), "auxiliary/recall": right / chosen}
        entry["tokens_per_second"] = self.tokens * self.args.world_size / (time.monotonic() - self.since)
        if self.stats.layers:
            entry |= self.stats.all_reduce().summary()
        self._clear()
        return entry

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write `<output_dir>/model`, whole under every ZeRO stage."""
        weights = gather_model(self.core)
        if self.args.should_save:
            history = {
                "stage": self.config.stage,
                "data": self.data_digest,
                "seed": self.config.run.seed,
                "rows_seen": self.start + self.state.global_step * self.config.run.batch_size,
            }
            folder = Path(output_dir or self.config.run.output_dir) / MODEL
            write_model(folder, self.core, weights, self.processor, history)
