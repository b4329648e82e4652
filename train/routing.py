"""Routing in training: what a run does about it before a forward, after it, after a step and when an entry is logged.

Nothing here is counted twice under activation checkpointing: recomputation in backward is not recorded.
"""

import os
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm.common import ranks
from mllm.data.encoded import EncodedMixture
from mllm.mole import MoleConfig, MoleLayer, RoutingObjective, start_routers
from mllm.mole.start import Start, start_rows
from mllm.routing import RoutingStats
from mllm.routing.watch import RoutingWatch

VISION_MODULES = ("vision_tower", "multi_modal_projector")  # what embeds pictures


def start_from_domains(model: nn.Module, samples: EncodedMixture, order: Iterable[int]) -> Start | None:
    """Where routers read pictures and are to start from them: does so as `start_routers`, from the first rows.

    Before the engine starts, since ZeRO copies and splits weights then; every rank computes the same. None where there
    was nothing to do.
    """
    config = getattr(model, "peft_config", {}).get("default")
    if not isinstance(config, MoleConfig) or not config.starts_from_pictures:
        return None
    domains = samples.mixture.domain_of_row
    rows = start_rows(domains, chain(map(int, order), range(len(domains))))
    base = model.get_base_model()
    home = base.device
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else home
    # The language model stays where it is: before ZeRO has split it, it may not fit the GPU.
    vision = [part for name, part in base.named_modules() if name.rpartition(".")[2] in VISION_MODULES]
    for part in vision:
        part.to(device)
    pictures_ND = torch.stack([mean_picture(base, samples[row]["pixel_values"].to(device)) for row in rows])
    for part in vision:
        part.to(home)
    start = start_routers(model, pictures_ND.to(home), [domains[row] for row in rows])
    if ranks.is_first():
        of = f"{config.router_start} ({', '.join(config.expert_domains or [])})"
        told = f"{start.right:.0%} of held-out rows right"
        if start.is_set:
            print(f"routers start from {of}: {told}", flush=True)
        else:
            print(
                f"routers start at random: pictures do not tell {of}, {told}. They learn at optim.lr, whatever "
                "optim.part_lr.router says.",
                flush=True,
            )
    return start


@torch.no_grad()
def mean_picture(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """[D] fp32 mean embedding of a row's pictures [N, 3, H, W]; zeros without one."""
    if not len(pixel_values):
        return torch.zeros(model.config.get_text_config().hidden_size, device=pixel_values.device)
    with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        embeds = model.get_image_features(pixel_values.to(model.dtype)).pooler_output  # the trained projector is fp32
    return torch.cat(list(embeds)).float().flatten(0, -2).mean(0)


class RunRouting(TrainerCallback):
    """Follows the routing of a model with MOLE; does nothing for any other.

    A callback of Trainer, which tells it where steps begin and end; the rest the trainer calls. All ranks call every
    method together.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device  # where the figures of the ranks are added up
        self.objective = RoutingObjective(model)
        self.context = self.objective.context
        self.gradients = RouterGradients(model)
        self.watch = RoutingWatch()
        self.last = RoutingStats()  # of the interval logged last, over all ranks
        self._clear()

    def _clear(self) -> None:
        self.stats = RoutingStats()
        self.losses: dict[str, Tensor] = {}
        self.batches = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.objective.steps = state.max_steps
        self.objective.begin_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.objective.bias.move()  # before Trainer saves, so that a checkpoint holds the bias of its step

    def before_forward(self, domains: list[str]) -> None:
        """Tell the rows' domains to routers that go by them."""
        self.objective.set_domains(domains)

    def after_forward(self, domains: list[str]) -> Tensor | float:
        """Take in the routings of the last forward; returns its weighted routing losses, 0 where it has none."""
        if self.context is None:
            return 0.0
        self.batches += 1
        self.stats.update(self.context, domains)
        loss = self.objective.loss()
        for name, value in self.objective.parts.items():
            self.losses[name] = self.losses.get(name, 0.0) + value.double()
        return loss

    def drain(self, step: int) -> dict[str, Any]:
        """Figures since the last call, over all ranks, and `warnings` where something needs a person's eye.

        The mean of each routing loss, the summary of RoutingStats, and routing/router_grad_norm, the mean over the
        layers whose router learns.
        """
        if self.context is None:
            return {}
        entry: dict[str, Any] = {
            name: (ranks.summed(value) / self.batches / ranks.size()).item() for name, value in self.losses.items()
        }
        self.last = self.stats.all_reduce()
        entry |= self.last.summary()
        norms = self.gradients.drain(self.batches, self.device)
        if norms:
            entry["routing/router_grad_norm"] = sum(norms.values()) / len(norms)
        # a router that does not learn is as skewed as it was made to be
        warnings = self.watch.observe(step, self.last, norms) if norms else []
        if warnings:
            entry["warnings"] = warnings
        self._clear()
        return entry


class RouterGradients:
    """Norms of the gradients that trained routers get, taken by hooks: ZeRO leaves no rank a whole gradient to look at.

    A router's figure is the root of the mean square over micro-batches and ranks, before ranks are averaged and
    gradients clipped. A router that nothing reaches has 0.
    """

    def __init__(self, model: nn.Module) -> None:
        self.squares: dict[str, Tensor | float] = {}
        for module in model.modules():
            if isinstance(module, MoleLayer) and module.layer is not None:
                for parameter in module.mole_router.parameters():
                    if parameter.requires_grad:
                        self.squares[module.layer] = 0.0
                        parameter.register_hook(partial(self._add, module.layer))

    def _add(self, layer: str, gradient: Tensor) -> None:
        self.squares[layer] = self.squares[layer] + gradient.detach().double().square().sum()

    def drain(self, batches: int, device: torch.device) -> dict[str, float]:
        """Layer -> norm over the micro-batches since the last call. All ranks call it together."""
        if not self.squares:
            return {}
        squares = [torch.as_tensor(square, dtype=torch.float64, device=device) for square in self.squares.values()]
        norms = (ranks.summed(torch.stack(squares)) / (batches * ranks.size())).sqrt().tolist()
        self.squares = dict.fromkeys(self.squares, 0.0)
        return dict(zip(self.squares, norms, strict=True))


def routing_table(stats: RoutingStats) -> Table:
    """What each layer did: real experts a token, share of null picks, entropy in nats, share of the busiest expert."""
    columns = {"load": "load", "null_share": "null share", "entropy": "entropy", "max_share": "busiest share"}
    table = Table("layer", *columns.values(), title="routing in the last logged interval")
    figures = stats.summary()
    for layer in stats.layers:
        table.add_row(layer, *(f"{figures[f'routing/{column}/{layer}']:.2f}" for column in columns))
    return table
