"""Fine-tuning of a frozen base by the dozen, in one process: what a study does once for every arm and seed.

Tower and projector stay frozen and their embeddings are computed once, so that an arm costs the language model alone.
A run that belongs to a product goes through `mllm train`; this is its equal in model, labels and loss, without
DeepSpeed, checkpoints and a trained projector.

B batch, S sequence, N pictures, P patches, D width of the language model, T supervised tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration, LlavaProcessor, get_scheduler
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm.data.conversation import Conversation
from mllm.data.template import IGNORED, ConversationEncoder
from mllm.mole import MoleConfig, RoutingObjective, routing_context, start_routers
from mllm.mole.start import start_rows
from train.config import OptimSection
from train.parts import parameter_groups, router_rate_after
from train.trainer import answer_losses


@dataclass(frozen=True)
class CachedSet:
    """Encoded conversations whose pictures are embeddings already.

    `image_embeds` [N, P, D] in the base's type and on its device, where batches go; `pictures[i]` are the rows
    of it that sample i shows, in order.
    """

    samples: list[dict[str, Any]]
    image_embeds: Tensor
    pictures: list[list[int]]
    domains: list[str]
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, rows: Sequence[int]) -> tuple[dict[str, Any], Tensor, list[str]]:
        """What the model reads, padded on the right; labels [B, S]; and the domain of each row."""
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        padded = {
            key: pad_sequence([self.samples[row][key] for row in rows], batch_first=True, padding_value=fill).to(
                self.image_embeds.device
            )
            for key, fill in fills.items()
        }
        labels = padded.pop("labels")
        shown = [picture for row in rows for picture in self.pictures[row]]
        if shown:
            padded["mm_encoder_outputs"] = {
                "image": BaseModelOutputWithPooling(pooler_output=list(self.image_embeds[shown]))
            }
        return padded, labels, [self.domains[row] for row in rows]

    def pictures_ND(self, rows: Sequence[int]) -> Tensor:
        """[N, D] fp32: of each row the mean embedding of its pictures, zeros without one."""
        nothing_PD = torch.zeros_like(self.image_embeds[:1])
        shown = (self.image_embeds[self.pictures[row]] if self.pictures[row] else nothing_PD for row in rows)
        return torch.stack([embeds.float().flatten(0, 1).mean(0) for embeds in shown])

    def part(self, rows: Sequence[int]) -> "CachedSet":
        """These rows alone."""
        names = ("samples", "pictures", "domains")
        return replace(self, **{name: [getattr(self, name)[row] for row in rows] for name in names})

    def rows_of(self, domains: Sequence[str]) -> list[int]:
        """Row numbers of these domains."""
        return [row for row, name in enumerate(self.domains) if name in domains]


@torch.no_grad()
def cache(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, conversations: Sequence[Conversation]
) -> CachedSet:
    """Encode every conversation and embed every picture once. Raises UserError naming the row, as encoding does."""
    encoder, samples, pictures, embeds = ConversationEncoder(processor), [], [], []
    rows_of_images: dict[tuple, list[int]] = {}
    for conversation in conversations:
        sample = encoder.encode(conversation)
        pixels = sample.pop("pixel_values").to(model.device, model.dtype)
        if conversation.images not in rows_of_images:
            rows_of_images[conversation.images] = list(range(len(embeds), len(embeds) + len(pixels)))
            embeds += model.get_image_features(pixels).pooler_output if len(pixels) else []
        samples.append(sample)
        pictures.append(rows_of_images[conversation.images])
    tokenizer = processor.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    stacked = torch.stack(embeds) if embeds else torch.empty(0, device=model.device)
    return CachedSet(samples, stacked, pictures, [conversation.domain for conversation in conversations], pad)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model learns. Samples and their order follow from `seed` alone."""

    steps: int
    batch_size: int
    optim: OptimSection
    seed: int = 0

    def order(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """The rows of each step: shuffled passes over `rows`, cut into batches."""
        draws, rng = self.steps * self.batch_size, np.random.default_rng(self.seed)
        passes = [rng.permutation(rows) for _ in range(-(-draws // len(rows)))]
        return iter(np.concatenate(passes)[:draws].reshape(self.steps, self.batch_size).tolist())


def finetune(
    base: nn.Module,
    adapter: PeftConfig,
    data: CachedSet,
    schedule: Schedule,
    *,
    rows: Sequence[int] | None = None,
    on_step: Callable[[int, float, PeftModel], None] | None = None,
) -> PeftModel:
    """An adapter on `base`, trained on `rows` of `data` (None: all). Adapters start from `schedule.seed`.

    A rate of routers' own holds where pictures tell them how to start, or where they do not start from pictures.

    Take it off again with `model.unload()`: it changes `base` in place. `on_step` is called with step, loss and model.
    """
    torch.manual_seed(schedule.seed)
    model = get_peft_model(base, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    config = model.peft_config["default"]
    if isinstance(config, MoleConfig) and config.starts_from_pictures and len(data.image_embeds):
        first = start_rows(data.domains, range(len(data)) if rows is None else rows)
        start = start_routers(model, data.pictures_ND(first), [data.domains[row] for row in first])
        schedule = replace(schedule, optim=router_rate_after(schedule.optim, start))
    return optimise(model, data, schedule, rows=rows, on_step=on_step)


def optimise(
    model: nn.Module,
    data: CachedSet,
    schedule: Schedule,
    *,
    rows: Sequence[int] | None = None,
    on_step: Callable[[int, float, nn.Module], None] | None = None,
) -> nn.Module:
    """Train whatever of `model` requires a gradient; AdamW, warm-up and schedule as `mllm train` has them."""
    optim = schedule.optim
    optimizer = torch.optim.AdamW(parameter_groups(model, optim), betas=optim.betas, fused=True)
    schedules = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    warmup = round(optim.warmup_ratio * schedule.steps)
    rate = get_scheduler(schedules[optim.schedule], optimizer, warmup, schedule.steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    objective = RoutingObjective(model, schedule.steps)
    model.train()
    for step, batch_rows in enumerate(schedule.order(range(len(data)) if rows is None else rows)):
        inputs, labels, domains = data.batch(batch_rows)
        objective.set_domains(domains)
        with study_precision(model):
            loss = answer_losses(model, inputs | {"use_cache": False}, labels).loss_T.mean()
        (loss + objective.loss()).backward()
        nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        optimizer.step()
        objective.step()
        rate.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step, loss.item(), model)
    return model.eval()


@contextmanager
def study_precision(model: nn.Module) -> Iterator[None]:
    """Forward passes as studies make them: bfloat16 products where the model is, and on a CPU plain attention."""
    device = next(model.parameters()).device.type
    # On a CPU torch's flash attention takes more time backwards than it saves: a quarter of a whole step.
    attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
    with attention, torch.autocast(device, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        yield


@dataclass(frozen=True)
class Scores:
    """Of each sample: mean loss of its answer tokens, and whether greedy decoding would give the answer to the letter.

    Greedy decoding repeats an answer exactly when every answer token, its end included, is the most probable one after
    those before it; so one forward tells what generation would.
    """

    loss: np.ndarray
    exact: np.ndarray


@torch.no_grad()
def score_answers(
    model: nn.Module,
    data: CachedSet,
    *,
    batch_size: int = 64,
    after_batch: Callable[[list[str]], None] | None = None,
) -> Scores:
    """Score every sample of `data`; `after_batch` gets the batch's domains while the routing context holds it."""
    model.eval()
    context, losses, exact = routing_context(model), [], []
    for start in range(0, len(data), batch_size):
        inputs, labels, domains = data.batch(range(start, min(start + batch_size, len(data))))
        if context is not None:
            context.set_domains(domains)
        with study_precision(model):
            answers = answer_losses(model, inputs | {"use_cache": False}, labels)
        loss_sum_B, tokens_B = answers.by_row(len(labels))
        losses.append(loss_sum_B / tokens_B)
        exact.append(answers.row_T[answers.is_right_T].bincount(minlength=len(labels)) == tokens_B)
        if after_batch is not None:
            after_batch(domains)
    return Scores(torch.cat(losses).cpu().numpy(), torch.cat(exact).cpu().numpy())
