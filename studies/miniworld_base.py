"""Trains the embedded base model from scratch on miniworld: ``python -m studies.miniworld_base``.

Stages as LLaVA has them, all on scenes of the train split drawn on the fly, with neutral answers only, so that each
domain's convention is left to instruction tuning:

1. tower: open_clip contrastive training of a ViT against dense captions;
2. align: projector and language model learn to read dense captions off the frozen tower (the language model starts
   from nothing here, so it is trained along);
3. describe, any_order, find, look_up, answer: instruction tuning on captions and questions, in the order of ``PLAN``.

Each stage leaves its weights in ``--work``, so an interrupted run goes on with the stage it was in.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import typer
from open_clip.loss import ClipLoss
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data_recipes.miniworld import CONVENTIONS, DOMAINS, NEUTRAL, Scene, draw_scene
from data_recipes.miniworld.__main__ import write
from mllm.build import build
from mllm.common import ranks
from mllm.common.precision import has_bf16
from mllm.common.provenance import provenance
from mllm.data.collate import Collator
from mllm.data.conversation import IMAGE_PLACE, Turn
from mllm.data.template import IGNORED, ConversationEncoder
from mllm.inference.evaluate import evaluate_arms

ASSETS, WORK = Path("mllm/assets/miniworld"), Path("runs/miniworld_base")
VOCABULARY = 2048
QUESTIONS = 8  # asked of a scene that is not described
EMBEDDING = 128  # width of the contrastive space
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
VISION = {"image_size": 96, "patch_size": 12, "width": 192, "layers": 5, "head_width": 32}
TEXT = {"context_length": 80, "vocab_size": VOCABULARY, "width": 128, "heads": 4, "layers": 2}
SHORT_ANSWER = "Answer the question using a single word or phrase."  # LLaVA's suffix: users' data carries it


@dataclass(frozen=True)
class Stage:
    """One stage of training: how long, and what is shown."""

    scenes: int
    batch: int  # scenes a step
    peak: float  # highest learning rate
    described: float = 1.0  # share of scenes described in reading order
    shuffled: float = 0.0  # share described in any order; the rest is asked questions
    questions: int = 8  # asked of one scene
    forms: tuple[str, ...] = ()  # forms of question; all of them if none are named
    turns: tuple[str, ...] = DOMAINS  # domains in turn; one that stands there twice comes twice as often
    trains_tower: bool = False


# Reading off what stands at a place is learned from captions, whose order says which place is meant. Finding the place
# of a thing is a circuit of its own. It did not form in 280,000 scenes of everything mixed; asked for nothing else, in
# one domain, it formed within 30,000 and held in the other domains at once. Presence, value and relation then followed.
LOOK_UP = ("place", "presence", "colour", "relation", "value", "greatest", "least", "larger", "sum", "count")
PLAN = {
    "tower": Stage(60_000, 128, 1e-3),
    "align": Stage(8_000, 64, 1e-3),
    "describe": Stage(195_000, 64, 1e-3, described=0.5, trains_tower=True),
    "any_order": Stage(85_000, 64, 1e-3, described=0.15, shuffled=0.45),
    "find": Stage(36_000, 64, 1e-3, described=0.0, questions=3, forms=("place",), turns=("general",)),
    "look_up": Stage(
        42_000,
        64,
        8e-4,
        described=0.05,
        shuffled=0.05,
        questions=6,
        forms=LOOK_UP,
        turns=("general", "document", "general", "biomedical"),
    ),
    "answer": Stage(
        41_000,
        64,
        8e-4,
        described=0.05,
        shuffled=0.05,
        turns=("document", "general", "document", "biomedical", "document", "general"),
    ),
}


def drawn(start: int, count: int, seed: int, turns: tuple[str, ...] = DOMAINS) -> list[tuple[Scene, Random]]:
    """``count`` training scenes from running number ``start`` on, domains by ``turns``."""
    return [
        draw_scene(DOMAINS[k % len(DOMAINS)], "train", k // len(DOMAINS), seed) for k in range(start, start + count)
    ]


def pixels(pictures: list[Image.Image]) -> Tensor:
    """float32[N, 3, 96, 96], normalised as the tower's image processor does."""
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    return (stacked.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def tokenizer_of(folder: Path, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer an earlier run left in ``folder``, or a new one."""
    if not folder.exists():
        train_tokenizer(seed).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over miniworld's words and some plain English, digits one by one; it can write any text."""
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


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings and the rest; with Muon's rate scaled to AdamW's one serves both."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in trained.items() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def optimise(model: nn.Module, stage: Stage, loss_of: Callable[[int, int], Tensor], name: str) -> None:
    """Trains what requires a gradient: warm-up over a twentieth of the steps, the peak rate, a fall over a quarter.

    ``loss_of(start, count)`` is the mean loss on ``count`` scenes from number ``start`` on. Under torchrun each rank
    takes its share of the scenes of a step and gradients are averaged.
    """
    steps, share = max(10, stage.scenes // stage.batch), stage.batch // ranks.size()
    parameters, optimizers = [p for p in model.parameters() if p.requires_grad], optimisers(model)
    started, average = time.time(), None
    with progress() as bar:
        task = bar.add_task(name, total=steps, status="")
        for step in range(steps):
            rate = stage.peak * min(1.0, 20 * (step + 1) / steps, 4 * (1 - step / steps))
            loss = loss_of(step * stage.batch + ranks.rank() * share, share)
            loss.backward()
            average_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            speed = (step + 1) * stage.batch / (time.time() - started)
            bar.update(task, advance=1, status=f"loss {average:.3f}, {speed:.0f} scenes/s")


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean over ranks, in one message."""
    if ranks.size() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = nn.utils.parameters_to_vector(gradients) / ranks.size()
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, gradients)


def contrastive_model(tokenizer: PreTrainedTokenizerFast) -> open_clip.CLIP:
    """The tower with a small text encoder, not trained yet."""
    text = TEXT | {"pool_type": "eos", "eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    return open_clip.CLIP(embed_dim=EMBEDDING, vision_cfg=VISION, text_cfg=text)


def train_tower(clip: open_clip.CLIP, tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int) -> None:
    """Stage 1. Contrastive training (CLIP, arXiv 2103.00020) on pictures and dense captions."""
    contrast = ClipLoss(gather_with_grad=True, rank=ranks.rank(), world_size=ranks.size())

    def loss_of(start: int, batch: int) -> Tensor:
        scenes = drawn(start, batch, seed)
        captions = tokenizer(
            [scene.caption + tokenizer.eos_token for scene, _ in scenes],
            padding="max_length", max_length=TEXT["context_length"], padding_side="right", return_tensors="pt",
        )["input_ids"]  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            image, words, scale = clip(pixels([scene.paint(rng) for scene, rng in scenes]), captions)
        return contrast(image.float(), words.float(), scale)

    optimise(clip, stage, loss_of, "tower")


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

    def __init__(self, processor: LlavaProcessor, seed: int, stage: Stage) -> None:
        self.encoder, self.collator = ConversationEncoder(processor), Collator(processor)
        self.seed, self.stage = seed, stage

    def __call__(self, start: int, count: int) -> dict[str, Tensor]:
        """The batch of ``count`` scenes from running number ``start`` on."""
        scenes = drawn(start, count, self.seed, self.stage.turns)
        batch = self.collator([self.sample(scene, rng) for scene, rng in scenes])
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    def sample(self, scene: Scene, rng: Random) -> dict:
        """What the collator takes, with the picture from memory instead of from a file."""
        picture = scene.paint(rng)
        exchanges = self.exchanges(scene, rng)
        turns = [turn for question, answer in exchanges for turn in (Turn("user", question), Turn("assistant", answer))]
        turns[0] = Turn("user", f"{IMAGE_PLACE}\n{turns[0].text}")
        sample = self.encoder.encode_turns(turns, [picture], where=scene.source)
        return sample | {"domain": "", "where": ""}

    def exchanges(self, scene: Scene, rng: Random) -> list[tuple[str, str]]:
        """What is said about a scene: a caption, one in any order, or questions with neutral answers."""
        stage, share = self.stage, rng.random()
        if share < stage.described:
            return [("Describe the picture.", scene.caption)]
        if share < stage.described + stage.shuffled:
            return [("Describe the picture in any order.", scene.caption_in_any_order(rng))]
        questions = scene.ask_several(rng, NEUTRAL, stage.questions, stage.forms)
        return [(question.text, question.answer) for question in questions]


def train_llava(model: LlavaForConditionalGeneration, batches: SceneBatches, name: str) -> None:
    """A stage after the tower's: what is trained learns the supervised tokens, in bfloat16 products with fp32 weights.

    A CPU without instructions for bfloat16 multiplies in fp32.
    """

    model.train()
    model.model.vision_tower.requires_grad_(batches.stage.trains_tower)
    # On a CPU torch's fused attention spends more time in backward than all other products together.
    model.model.language_model.set_attn_implementation("eager")

    def loss_of(start: int, batch: int) -> Tensor:
        inputs = batches(start, batch)
        targets = inputs.pop("labels")[:, 1:]
        supervised = targets != IGNORED
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()), sdpa_kernel(SDPBackend.MATH):
            states = model.model(**inputs).last_hidden_state[:, :-1][supervised]
            logits = model.lm_head(states)  # only where something is supervised: most positions are the picture's
        return nn.functional.cross_entropy(logits.float(), targets[supervised])

    optimise(model, batches.stage, loss_of, name)


def run_stage(path: Path, module: nn.Module, stage: Stage, seed: int, train: Callable[[], None]) -> None:
    """A stage: weights that a run of the same recipe left in ``path`` are read, else they are trained and left."""
    card, recipe = path.with_suffix(".json"), json.loads(json.dumps({"seed": seed} | asdict(stage)))
    if card.exists() and json.loads(card.read_text())["recipe"] == recipe:
        module.load_state_dict(load_file(path), strict=False)  # a tied head is stored once
        return
    start = time.time()
    train()
    if ranks.is_first():
        save_model(module, path)
        card.write_text(json.dumps({"minutes": round((time.time() - start) / 60, 1), "recipe": recipe}))


def main(
    out: Annotated[Path, typer.Option(help="Where model, processor and card.json go.")] = ASSETS,
    work: Annotated[Path, typer.Option(help="Where stages leave their weights.")] = WORK,
    seed: int = 0,
    scale: Annotated[float, typer.Option(help="Times the plan's number of scenes; 0.01 for a trial.")] = 1.0,
) -> None:
    """Train the embedded base and score it on unseen scenes with neutral questions."""
    plan = {name: replace(stage, scenes=round(stage.scenes * scale)) for name, stage in PLAN.items()}
    with ranks.joined():
        model, processor = trained_base(plan, work, seed)
        publish(model, processor, out, work, {"seed": seed, "plan": {name: asdict(s) for name, s in plan.items()}})


def trained_base(plan: dict[str, Stage], work: Path, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Every stage of the plan, or the weights that an earlier start of it has left in `work`."""
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(work / "tokenizer", seed)

    clip = contrastive_model(tokenizer)
    tower, *stages = plan.items()
    run_stage(work / "tower.safetensors", clip, tower[1], seed, lambda: train_tower(clip, tokenizer, tower[1], seed))

    parts = (clip, {"embed_dim": EMBEDDING, "vision_cfg": VISION})
    model, processor = build(
        parts, language_model(tokenizer), tokenizer=tokenizer, resize_mode="squash", dtype=torch.float32
    )
    for number, (name, stage) in enumerate(stages, start=1):
        batches = SceneBatches(processor, seed + number, stage)
        run_stage(
            work / f"{name}.safetensors", model, stage, seed, lambda name=name, b=batches: train_llava(model, b, name)
        )
    return model, processor


def publish(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path, work: Path, card: dict) -> None:
    """Saves the model in bfloat16 and writes its card: seed, plan, minutes, commit and scores. Every rank calls it."""
    world = work / "neutral"
    if ranks.is_first():
        model.to(torch.bfloat16).save_pretrained(out)
        processor.save_pretrained(out)
        write(world, {"train": 500, "test": 250}, questions=2, seed=card["seed"], neutral=True)
    world = ranks.shared(world)  # the others wait for the first
    report = evaluate_arms(
        str(out), {"base": None}, world / "test.json", work / "report", train_rows=world / "train.json", batch_size=64
    )
    if ranks.rank() > 0:
        return
    card["minutes"] = {path.stem: json.loads(path.read_text())["minutes"] for path in sorted(work.glob("*.json"))}
    card["neutral_test_scores"] = report["arms"]["base"]
    card["measured"] = provenance()
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
