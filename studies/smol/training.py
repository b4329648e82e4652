"""The stages: what is optimised, step by step, kept every few minutes and taken up again.

The adapter is LoRA, trained as a change of the weights themselves: W + BA is put together once a step and rounded as
the merged weights will be. Beside matrices as small as these, A and B run on their own would double the time.
"""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from mllm.data.template import IGNORED
from studies.smol.data import Branch, batches, collate, pack, take
from studies.smol.features import Features
from studies.smol.plan import ALPHA, RANK, SEED, Stage

KEPT_EVERY = 240  # seconds
CHECKED_EVERY = 500  # steps; a check takes as long as 40 of them


class MergedProduct(torch.autograd.Function):
    """x (W + s B A)ᵀ from the merged weights, with gradients for A and B that never form that of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, merged: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, merged, A, B)
        ctx.scale = scale
        return x @ merged.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, A, B = ctx.saved_tensors
        flat, rows = gradient.flatten(0, -2), x.flatten(0, -2)
        of_A = (flat @ B.to(flat.dtype)).T @ rows
        of_B = flat.T @ (rows @ A.to(rows.dtype).T)
        return gradient @ merged, None, ctx.scale * of_A.float(), ctx.scale * of_B.float(), None


class LowRankLinear(nn.Module):
    """A linear map with LoRA (arXiv 2106.09685) added to its weights once a step, rounded to their dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        rows, columns = linear.weight.shape
        self.A = nn.Parameter(torch.empty(RANK, columns).uniform_(-1, 1) / math.sqrt(columns))
        self.B = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            merged = torch.addmm(self.weight.float(), self.B, self.A, alpha=ALPHA / RANK).to(self.weight.dtype)
        return MergedProduct.apply(x, merged, self.A, self.B, ALPHA / RANK)


class Learner(nn.Module):
    """The projector, in float32 on standardised features, and the language model with or without a change."""

    def __init__(self, model: LlavaForConditionalGeneration, features: Features, pad: int) -> None:
        super().__init__()
        self.model, self.features, self.pad = model, features, pad
        self.image_id = model.config.image_token_id
        model.requires_grad_(False)
        self.projector = model.model.multi_modal_projector.float()
        self.projector.requires_grad_(True)
        self.adapted: dict[str, LowRankLinear] = {}
        # torch's fused attention in bfloat16 takes three times as long on a processor as the plain products.
        model.model.language_model.set_attn_implementation("eager")

    def add_adapter(self) -> None:
        """Makes every linear map of the language model trainable through LoRA."""
        if self.adapted:
            return
        torch.manual_seed(SEED)
        language_model = self.model.model.language_model
        for name, module in list(language_model.named_modules()):
            if isinstance(module, nn.Linear):
                self.adapted[name] = LowRankLinear(module)
                language_model.set_submodule(name, self.adapted[name])

    def trained(self) -> dict[str, Tensor]:
        """Every tensor that is learned, by name."""
        found = {f"projector.{name}": p for name, p in self.projector.named_parameters()}
        for name, linear in self.adapted.items():
            found |= {f"adapter.{name}.A": linear.A, f"adapter.{name}.B": linear.B}
        return found

    def answer_logits(self, batch: dict[str, Tensor], keys: list[str]) -> Tensor:
        """float32 `[answer tokens, vocabulary]`, in the order of the batch's labels."""
        llava = self.model.model
        embedded = llava.get_input_embeddings()(batch["input_ids"])
        if keys:
            seen = self.projector(self.features(keys)).to(embedded.dtype)
            embedded = embedded.masked_scatter(batch["is_image"][..., None], seen)
        unseen = torch.zeros(batch["mask"].shape, dtype=embedded.dtype)
        unseen.masked_fill_(~batch["mask"], torch.finfo(embedded.dtype).min)
        states = llava.language_model(
            inputs_embeds=embedded, attention_mask=unseen, position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        return self.model.lm_head(states[batch["labels"] != IGNORED]).float()

    def run(self, rows: list[list[Branch]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits, losses of the answer tokens, and the batch."""
        batch = collate(rows, self.pad, self.image_id)
        logits = self.answer_logits(batch, [row[0].picture for row in rows if row[0].picture])
        return logits, F.cross_entropy(logits, batch["labels"][batch["labels"] != IGNORED], reduction="none"), batch


def epochs(branches: list[Branch], stage: Stage, name: str) -> Iterator[list[list[list[Branch]]]]:
    """The batches of each epoch; of a last part of one, as many as its part."""
    for epoch in range(math.ceil(stage.epochs)):
        rng = Random(f"{SEED}/{name}/{epoch}")
        found = batches(pack(take(branches, stage, epoch), rng), stage.tokens, rng)
        yield found[: round(len(found) * min(1.0, stage.epochs - epoch))]


def rate(step: int, steps: int, stage: Stage) -> float:
    """The share of the highest rate: rises over 30 steps, then stays or falls along a cosine."""
    rise = min(1.0, (step + 1) / 30)
    return rise * (0.5 * (1 + math.cos(math.pi * step / steps)) if stage.falls else 1.0)


def train_stage(
    learner: Learner,
    name: str,
    stage: Stage,
    branches: list[Branch],
    checked: list[Branch],
    folder: Path,
    after: int = 0,
    until: float = math.inf,
) -> tuple[int, bool]:
    """Trains one stage, on from where it was, and returns at which step it is and whether that is its end.

    Args:
        after: at which step the stage before it was; what is kept of one that began elsewhere is not gone on with.
        until: `time.time()` at which to stop.
    """
    if stage.adapter_rate:
        learner.add_adapter()
    trained = learner.trained()
    highest = {"projector": stage.projector_rate, "adapter": stage.adapter_rate}
    highest = {part: top for part, top in highest.items() if top}
    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in trained.items() if n.startswith(part)]} for part in highest],
        lr=0.0, betas=(0.9, 0.98), weight_decay=0,
    )  # fmt: skip
    plan = [batch for found in epochs(branches, stage, name) for batch in found]
    kept, step, spent = folder / f"{name}.pt", 0, 0.0
    saved = torch.load(kept, weights_only=True) if kept.exists() else None
    if saved is not None and saved["after"] == after:
        put(trained, saved["trained"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["seconds"]
    started = last_kept = time.time()
    first, average = step, None

    def keep() -> None:
        part = kept.with_suffix(".part")
        learned = {name: tensor.detach() for name, tensor in trained.items()}
        facts = {"step": step, "steps": len(plan), "after": after, "seconds": spent + time.time() - started}
        torch.save({"trained": learned, "optimizer": optimizer.state_dict(), **facts}, part)
        os.replace(part, kept)

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    ) as bar:  # fmt: skip
        task = bar.add_task(name, total=len(plan), completed=step, status="")
        while step < len(plan):
            for group, top in zip(optimizer.param_groups, highest.values(), strict=True):
                group["lr"] = top * rate(step, len(plan), stage)
            _, losses, batch = learner.run(plan[step])
            weights = batch["weights"][batch["labels"] != IGNORED]
            loss = (losses * weights).sum() / weights.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            bar.update(task, advance=1, status=f"loss {average:.3f}")
            if step % 10 == 0:
                pace = (time.time() - started) / (step - first)
                log(
                    folder,
                    stage=name,
                    step=f"{step} of {len(plan)}",
                    loss=round(average, 4),
                    seconds_a_step=round(pace, 1),
                    minutes_left=round(pace * (len(plan) - step) / 60),
                )
            if step % CHECKED_EVERY == 0:
                log(folder, stage=name, step=step, checked=check(learner, checked))
            if time.time() - last_kept > KEPT_EVERY:
                keep()
                last_kept = time.time()
            if time.time() > until:
                break
    keep()
    return step, step >= len(plan)


def put(trained: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Copies what a checkpoint holds into the learned tensors of the same names."""
    with torch.no_grad():
        for name, tensor in saved.items():
            trained[name].copy_(tensor)


@torch.no_grad()
def graded(
    learner: Learner, branches: list[Branch], blank: Tensor | None = None
) -> Iterator[tuple[Branch, float, bool]]:
    """Each branch with its loss, summed over the answer's tokens, and whether greedy decoding would give it exactly.

    Args:
        blank: `[P, D]`, features to show in place of every picture's.
    """
    shown = learner.features
    if blank is not None:
        learner.features = lambda keys: blank.expand(len(keys), -1, -1)
    for rows in batches(pack(branches, Random(SEED)), 4096, Random(SEED)):
        logits, losses, batch = learner.run(rows)
        right = logits.argmax(-1) == batch["labels"][batch["labels"] != IGNORED]
        start = 0
        for branch in (branch for row in rows for branch in row):
            own = slice(start, start + branch.answer)
            yield branch, float(losses[own].sum()), bool(right[own].all())
            start += branch.answer
    learner.features = shown


def check(learner: Learner, branches: list[Branch], blank: Tensor | None = None) -> dict[str, dict[str, float]]:
    """Per source and kind: mean loss of an answer token, how many answers are exact, and how many there are."""
    found = defaultdict(list)
    for branch, loss, exact in graded(learner, branches, blank):
        found[f"{branch.source} {branch.kind}"].append((loss, branch.answer, exact))
    return {
        name: {
            "loss": round(sum(loss for loss, _, _ in each) / sum(tokens for _, tokens, _ in each), 4),
            "exact": round(sum(exact for _, _, exact in each) / len(each), 4),
            "answers": len(each),
        }
        for name, each in sorted(found.items())
    }


def log(folder: Path, **facts: object) -> None:
    """One line of `log.jsonl`."""
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}) + "\n")
