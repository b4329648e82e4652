"""The stages: what is optimised, step by step, kept every few minutes and taken up again.

The adapter is LoRA, trained as a change of the weights themselves: W + BA is put together once a step and rounded as
the merged weights will be. That costs a third of running A and B beside each small matrix, and gives the same adapter.
"""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import LlavaForConditionalGeneration

from mllm.data.template import IGNORED
from studies.smol.data import Branch, batches, collate, pack, take
from studies.smol.features import Features
from studies.smol.plan import ALPHA, RANK, SEED, Stage

KEPT_EVERY = 240  # seconds
CHECKED_EVERY = 150  # steps


class LowRankChange(nn.Module):
    """LoRA (arXiv 2106.09685) as a parametrisation: W -> W + alpha/r B A, in the dtype of W."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.empty(RANK, columns).uniform_(-1, 1) / math.sqrt(columns))
        self.B = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight.float(), self.B, self.A, alpha=ALPHA / RANK).to(weight.dtype)


class Learner(nn.Module):
    """The projector, in float32 on standardised features, and the language model with or without a change."""

    def __init__(self, model: LlavaForConditionalGeneration, features: Features, pad: int) -> None:
        super().__init__()
        self.model, self.features, self.pad = model, features, pad
        self.image_id = model.config.image_token_id
        model.requires_grad_(False)
        self.projector = model.model.multi_modal_projector.float()
        self.projector.requires_grad_(True)
        self.changes: dict[str, LowRankChange] = {}

    def add_adapter(self) -> None:
        """Makes every linear map of the language model trainable through LoRA."""
        if self.changes:
            return
        torch.manual_seed(SEED)
        for name, module in list(self.model.model.language_model.named_modules()):
            if isinstance(module, nn.Linear):
                self.changes[name] = LowRankChange(module.weight)
                parametrize.register_parametrization(module, "weight", self.changes[name])

    def trained(self) -> dict[str, Tensor]:
        """Every tensor that is learned, by name."""
        found = {f"projector.{name}": p for name, p in self.projector.named_parameters()}
        for name, change in self.changes.items():
            found |= {f"adapter.{name}.A": change.A, f"adapter.{name}.B": change.B}
        return found

    def answer_logits(self, batch: dict[str, Tensor], keys: list[str]) -> Tensor:
        """float32 `[answer tokens, vocabulary]`, in the order of the batch's labels."""
        llava = self.model.model
        embedded = llava.get_input_embeddings()(batch["input_ids"])
        if keys:
            seen = self.projector(self.features(keys)).to(embedded.dtype)
            embedded = embedded.masked_scatter(batch["is_image"][..., None], seen)
        states = llava.language_model(
            inputs_embeds=embedded, attention_mask=batch["mask"], position_ids=batch["position_ids"], use_cache=False
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
            if step % CHECKED_EVERY == 0 or step == len(plan):
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
    with parametrize.cached():
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
