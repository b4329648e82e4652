"""Trains the embedded base model from scratch on miniworld: ``python -m train.miniworld_base --out mllm/assets/miniworld``.

Stages as LLaVA has them, all on scenes of the train split drawn on the fly, with neutral answers only, so that each
domain's convention is left to instruction tuning:

1. tower: open_clip contrastive training of a ViT against dense captions;
2. align: projector and language model learn to read dense captions off the frozen tower (the language model starts
   from nothing here, so it is trained along);
3. instruct: everything learns dense captions and neutral questions.

Each stage leaves its weights in ``--work``, so an interrupted run goes on with the stage it was in.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import open_clip
import torch
import typer
from open_clip.loss import ClipLoss
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data_recipes.miniworld import CONVENTIONS, DOMAINS, NEUTRAL, Scene, draw_scene
from mllm.build import build
from mllm.data.collate import Collator
from mllm.data.conversation import IMAGE_PLACE, Turn
from mllm.data.template import IGNORED, ConversationEncoder

VOCABULARY = 2048
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
VISION = {"image_size": 96, "patch_size": 12, "width": 192, "layers": 5, "head_width": 32}
TEXT = {"context_length": 80, "vocab_size": VOCABULARY, "width": 128, "heads": 4, "layers": 2}
SHORT_ANSWER = "Answer the question using a single word or phrase."  # LLaVA's suffix: users' data carries it


@dataclass(frozen=True)
class Plan:
    """Scenes seen in each stage, and its batch size and peak learning rate."""

    tower: tuple[int, int, float] = (60_000, 128, 1e-3)
    align: tuple[int, int, float] = (8_000, 64, 1e-3)
    instruct: tuple[int, int, float] = (120_000, 64, 1e-3)


def drawn(start: int, count: int, seed: int) -> list[tuple[Scene, Random]]:
    """``count`` training scenes from running number ``start`` on, domains in turn."""
    return [draw_scene(DOMAINS[k % len(DOMAINS)], "train", k // len(DOMAINS), seed) for k in range(start, start + count)]


def pixels(pictures: list[Image.Image]) -> Tensor:
    """float32[N, 3, 96, 96], normalised as the tower's image processor does."""
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    return (stacked.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over miniworld's words and some plain English, digits one by one; any text can be written in it."""
    import pydoc_data.topics  # the language reference: English prose that every Python has

    def texts() -> Iterator[str]:
        for scene, rng in drawn(0, 6000, seed):
            convention = CONVENTIONS[rng.choice(DOMAINS)]
            yield scene.caption
            for question in scene.ask_several(rng, rng.choice((convention, NEUTRAL)), 4):
                yield f"USER: {question.text} ASSISTANT: {question.answer}"
        yield from [f"{SHORT_ANSWER} Describe the picture."] * 200
        yield from pydoc_data.topics.topics.values()

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def progress() -> Progress:
    """A bar with count, loss, rate and remaining time."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )  # fmt: skip


def optimise(parameters: list[nn.Parameter], plan: tuple[int, int, float], loss_of: "callable", name: str) -> None:
    """AdamW, linear warm-up over a twentieth of the steps, cosine to a fiftieth; ``loss_of(start, batch)`` per step."""
    scenes, batch, rate = plan
    steps = scenes // batch
    matrices, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=0.05, div_factor=50, final_div_factor=1, cycle_momentum=False
    )
    start, average = time.time(), None
    with progress() as bar:
        task = bar.add_task(name, total=steps, status="")
        for step in range(steps):
            loss = loss_of(step * batch, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            rate_now = (step + 1) * batch / (time.time() - start)
            bar.update(task, advance=1, status=f"loss {average:.3f}, {rate_now:.0f} scenes/s")
            if step % 100 == 0:
                print(f"{name} step {step}/{steps} loss {average:.4f} {rate_now:.0f} scenes/s", flush=True)


def train_tower(tokenizer: PreTrainedTokenizerFast, plan: Plan, seed: int) -> open_clip.CLIP:
    """Stage 1. Contrastive training (CLIP, arXiv 2103.00020) on pictures and dense captions."""
    text = TEXT | {"pool_type": "eos", "eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    clip = open_clip.CLIP(embed_dim=128, vision_cfg=VISION, text_cfg=text)
    contrast = ClipLoss()

    def loss_of(start: int, batch: int) -> Tensor:
        scenes = drawn(start, batch, seed)
        captions = tokenizer(
            [scene.caption + tokenizer.eos_token for scene, _ in scenes],
            padding="max_length", max_length=TEXT["context_length"], padding_side="right", return_tensors="pt",
        )["input_ids"]  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            image, words, scale = clip(pixels([scene.paint(rng) for scene, rng in scenes]), captions)
        return contrast(image.float(), words.float(), scale)

    optimise(list(clip.parameters()), plan.tower, loss_of, "tower")
    return clip


def language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama with tied embeddings, not trained yet."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
            max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


class SceneBatches:
    """Scenes to batches, through the template and collator that instruction tuning uses."""

    def __init__(self, processor: LlavaProcessor, seed: int, captions: float) -> None:
        """``captions``: share of scenes that are described; the others are asked four neutral questions."""
        self.encoder, self.collator = ConversationEncoder(processor), Collator(processor)
        self.places = processor.image_token * (VISION["image_size"] // VISION["patch_size"]) ** 2
        self.image_token, self.seed, self.captions = processor.image_token, seed, captions

    def __call__(self, start: int, count: int) -> dict[str, Tensor]:
        """The batch of ``count`` scenes from running number ``start`` on."""
        scenes = drawn(start, count, self.seed)
        batch = self.collator([self.sample(scene, rng) for scene, rng in scenes])
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    def sample(self, scene: Scene, rng: Random) -> dict:
        """What the collator takes, with the picture from memory instead of from a file."""
        picture = scene.paint(rng)
        if rng.random() < self.captions:
            exchanges = [("Describe the picture.", scene.caption)]
        else:
            exchanges = [(asked.text, asked.answer) for asked in scene.ask_several(rng, NEUTRAL, 4)]
        turns = [turn for question, answer in exchanges for turn in (Turn("user", question), Turn("assistant", answer))]
        turns[0] = Turn("user", f"{IMAGE_PLACE}\n{turns[0].text}")
        segments = [
            segment._replace(text=segment.text.replace(self.image_token, self.places))
            for segment in self.encoder.template.segments(turns, where=scene.source)
        ]
        input_ids, labels = self.encoder.tokenize(segments)
        about = {"attention_mask": torch.ones_like(input_ids), "domain": "", "where": ""}
        return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels([picture]), **about}


def train_llava(
    model: LlavaForConditionalGeneration, batches: SceneBatches, plan: tuple[int, int, float], name: str
) -> None:
    """Stages 2 and 3: the trainable parameters learn the supervised tokens. bfloat16 products, fp32 weights."""

    def loss_of(start: int, batch: int) -> Tensor:
        inputs = batches(start, batch)
        targets = inputs.pop("labels")[:, 1:]
        asked = targets != IGNORED
        with torch.autocast("cpu", torch.bfloat16):
            states = model.model(**inputs).last_hidden_state[:, :-1][asked]
            logits = model.lm_head(states)  # only where something is supervised: most positions are the picture's
        return nn.functional.cross_entropy(logits.float(), targets[asked])

    optimise([p for p in model.parameters() if p.requires_grad], plan, loss_of, name)
