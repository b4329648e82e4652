"""`python -m studies.smol --data FOLDER`: trains what `smol` ships; the same command goes on where it was cut off.

FOLDER holds `train.json`, `pretrain_captions.json` and their pictures. Everything kept lies in MLLM_HOME/smol-training.
"""

import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from mllm.build import load
from mllm.console import quieten
from mllm.fetched import SMOL_PARTS
from mllm.smol import fetch
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
from studies.smol.plan import STAGES, WORK
from studies.smol.speech import answers, prompts
from studies.smol.training import Learner, log, put, train_stage
from studies.smol.words import start_projector

CHECKED_PICTURES = 24  # of each source, for the checks while it trains


def main(
    data: Annotated[Path, typer.Option(help="Folder with train.json, pretrain_captions.json and their pictures.")],
    minutes: Annotated[float | None, typer.Option(help="Stop after so many, with everything kept.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Of the instruct stage; default: the plan's.")] = None,
    until: Annotated[str, typer.Option(help="The last stage to run: align, instruct or settle.")] = "settle",
    threads: Annotated[int, typer.Option(help="Processor cores.")] = 1,
) -> None:
    """Runs all stages up to `until`."""
    quieten()
    torch.set_num_threads(threads)
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
    features = Features(WORK / "features")

    if not (WORK / "speech.json").exists():
        kept = [
            [list(turn) for turn in zip(asked, *zip(*answers(model, processor, asked), strict=True), strict=True)]
            for asked in prompts()
        ]
        write_json(WORK / "speech.json", kept)
    speech, held_out_speech = (speech_branches(encode, t) for t in json.loads((WORK / "speech.json").read_text()))

    trained_on = [branch for branch in branches if not is_held_out(branch.picture)] + speech
    checked = few_of_each(branches) + held_out_speech
    learner = Learner(model, features, processor.tokenizer.pad_token_id)
    start = WORK / "words.pt"
    if not start.exists():
        loss = start_projector(learner, trained_on, processor.tokenizer)
        log(WORK, stage="words", loss=loss)
        torch.save({name: tensor.detach() for name, tensor in learner.trained().items()}, start)
    put(learner.trained(), torch.load(start, weights_only=True))

    stop, after = math.inf if minutes is None else time.time() + 60 * minutes, 0
    for name, stage in STAGES.items():
        if name == "instruct" and epochs is not None:
            stage = replace(stage, epochs=epochs)
        after, finished = train_stage(learner, name, stage, trained_on, checked, WORK, after=after, until=stop)
        if not finished or name == until:
            break


def few_of_each(branches: list) -> list:
    """What is asked of the first CHECKED_PICTURES held-out pictures of each source."""
    chosen: dict[str, set[str]] = {}
    for branch in branches:
        known = chosen.setdefault(branch.source, set())
        if is_held_out(branch.picture) and len(known) < CHECKED_PICTURES:
            known.add(branch.picture)
    return [branch for branch in branches if branch.picture in chosen[branch.source]]


def write_json(path: Path, content: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    typer.run(main)
