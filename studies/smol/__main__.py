"""`python -m studies.smol train --data FOLDER` trains what `smol` ships; once more, it goes on where it was cut off.

FOLDER holds `train.json`, `pretrain_captions.json` and their pictures. `ship` then writes the package data, with the
scores on pictures kept from training. Everything kept lies in MLLM_HOME/smol-training.
"""

import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from transformers import LlavaProcessor

from mllm.bases.fetched import ASSETS, LANGUAGE_MODEL, SMOL_PARTS, TOWER
from mllm.bases.smol import fetch
from mllm.build import load
from mllm.common.console import quieten
from mllm.common.errors import UserError
from mllm.common.provenance import provenance
from studies.smol.data import (
    Branch,
    Encoder,
    is_held_out,
    real_branches,
    scene_branches,
    scene_pictures,
    speech_branches,
)
from studies.smol.features import Features, keep_features, pictures
from studies.smol.plan import LICENCES, SEED, SOURCES, STAGES, WORK
from studies.smol.shipping import read_trained, write_trained
from studies.smol.speech import answers, prompts
from studies.smol.training import Learner, check, log, put, train_stage
from studies.smol.validation import validate
from studies.smol.words import start_projector

CHECKED_PICTURES = 24  # of each source, for the checks while it trains

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Data = Annotated[Path, typer.Option(help="Folder with train.json, pretrain_captions.json and their pictures.")]
Threads = Annotated[int, typer.Option(help="Processor cores.")]


class Prepared(NamedTuple):
    """What training and shipping start from."""

    learner: Learner
    processor: LlavaProcessor
    branches: list[Branch]  # of pictures, kept ones too
    speech: list[Branch]
    held_out_speech: list[Branch]

    @property
    def trained_on(self) -> list[Branch]:
        return [branch for branch in self.branches if not is_held_out(branch.picture)] + self.speech


def prepare(data: Path) -> Prepared:
    """The parts, token ids, the tower's features and the language model's own answers; each made once."""
    WORK.mkdir(parents=True, exist_ok=True)
    model, processor = load(fetch(SMOL_PARTS))
    encode = Encoder(processor)
    if not (WORK / "branches.json").exists():
        made = real_branches(data, encode) + scene_branches(encode)
        write_json(WORK / "branches.json", [asdict(branch) for branch in made])
    branches = [Branch(**branch) for branch in json.loads((WORK / "branches.json").read_text(encoding="utf-8"))]

    photographs = sorted({branch.picture for branch in branches if branch.source != "miniworld"})
    drawn = ((key, picture) for key, picture, _, _ in scene_pictures())
    total = len({branch.picture for branch in branches})
    keep_features(model, processor, pictures(data, photographs, drawn), total, WORK / "features")

    if not (WORK / "speech.json").exists():
        kept = [
            [list(turn) for turn in zip(asked, *zip(*answers(model, processor, asked), strict=True), strict=True)]
            for asked in prompts()
        ]
        write_json(WORK / "speech.json", kept)
    turns = json.loads((WORK / "speech.json").read_text(encoding="utf-8"))
    learner = Learner(model, Features(WORK / "features"), processor.tokenizer.pad_token_id)
    return Prepared(learner, processor, branches, *(speech_branches(encode, split) for split in turns))


@app.command()
def train(
    data: Data,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many, with everything kept.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Of the instruct stage; default: the plan's.")] = None,
    shipped: Annotated[
        bool, typer.Option("--from-shipped", help="Begin `instruct` at what ships, for a machine without checkpoints.")
    ] = False,
    until: Annotated[str, typer.Option(help="The last stage to run: align, instruct or settle.")] = "settle",
    threads: Threads = 1,
) -> None:
    """Run what is missing of all stages, up to `until`."""
    quieten()
    torch.set_num_threads(threads)
    ready = prepare(data)
    learner, trained_on = ready.learner, ready.trained_on
    checked = few_of_each(ready.branches) + ready.held_out_speech
    start, stages = WORK / "words.pt", dict(STAGES)
    if shipped:
        learner.add_adapter()
        put(learner.trained(), read_trained(ASSETS, learner.features))
        del stages["align"]
    elif not start.exists():
        log(WORK, stage="words", loss=start_projector(learner, trained_on, ready.processor.tokenizer))
        torch.save({name: tensor.detach() for name, tensor in learner.trained().items()}, start)
    if not shipped:
        put(learner.trained(), torch.load(start, weights_only=True))

    stop, after = math.inf if minutes is None else time.time() + 60 * minutes, 0
    for name, stage in stages.items():
        if name == "instruct" and epochs is not None:
            stage = replace(stage, epochs=epochs)
        after, finished = train_stage(learner, name, stage, trained_on, checked, WORK, after=after, until=stop)
        if not finished or name == until:
            break


@app.command()
def ship(
    data: Data,
    stage: Annotated[str, typer.Option(help="Whose checkpoint: settle, or one before it.")] = "settle",
    state: Annotated[str, typer.Option(help="A word for the card on how far training is.")] = "training goes on",
    out: Annotated[Path, typer.Option(help="Folder of the package data.")] = ASSETS,
    threads: Threads = 1,
) -> None:
    """Score a checkpoint on the pictures kept from training, and write it as package data."""
    quieten()
    torch.set_num_threads(threads)
    if not (WORK / f"{stage}.pt").exists():
        raise UserError(f"{WORK / f'{stage}.pt'} is not there: train first.")
    ready = prepare(data)
    learner = ready.learner
    english_before = check(learner, ready.held_out_speech)["speech speech"]
    saved = torch.load(WORK / f"{stage}.pt", weights_only=True)
    learner.add_adapter()
    put(learner.trained(), saved["trained"])
    held_out = [branch for branch in ready.branches if is_held_out(branch.picture)]
    scores = validate(learner, ready.processor, ready.trained_on, held_out)
    steps = {
        name: {key: round(kept[key]) for key in ("step", "steps", "seconds")}
        for name in STAGES
        if (WORK / f"{name}.pt").exists() and (kept := torch.load(WORK / f"{name}.pt", weights_only=True))
    }
    card = {
        "parts": [LANGUAGE_MODEL.requirement, TOWER.requirement],
        "licence": "CC BY-SA 4.0 (projector and adapter; sources below)",
        "sources": SOURCES,
        "licences_of_coco_photos": LICENCES,
        "checkpoint": stage,
        "state": state,
        "stages": steps,
        "seed": SEED,
        "validation": "pictures of train kept from training; exact answers by greedy decoding, per cent",
        "scores": scores,
        "loss_on_own_text": {
            "before": english_before["loss"],
            "after": check(learner, ready.held_out_speech)["speech speech"]["loss"],
        },
        "measured": provenance(),
    }
    base, _ = load(SMOL_PARTS, dtype=torch.float32)
    write_trained(base, saved["trained"], learner.features, out, card)
    print(json.dumps({"scores": scores, "own text": card["loss_on_own_text"]}, indent=1))


def few_of_each(branches: list[Branch]) -> list[Branch]:
    """What is asked of the first CHECKED_PICTURES held-out pictures of each source."""
    chosen: dict[str, set[str]] = {}
    for branch in branches:
        known = chosen.setdefault(branch.source, set())
        if is_held_out(branch.picture) and len(known) < CHECKED_PICTURES:
            known.add(branch.picture)
    return [branch for branch in branches if branch.picture in chosen[branch.source]]


def write_json(path: Path, content: object) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    app()
