"""Miniworld with a dial for how much its domains contradict each other; for studies of mixed training.

    0  every domain answers in neutral words: nothing to be in conflict about but the pictures
    1  miniworld as it is: shared forms of question, each domain's own convention for the answer
    2  look-alikes: all domains show the same kind of scene, each on its own ground, and each has its own word for
       everything (its code book), which is never the neutral one that a base may know; the ground alone tells which

``python -m data_recipes.clashes --out FOLDER`` writes it as LLaVA JSON: all domains in train.json, and each alone in
train-DOMAIN.json.

With ``cue`` every question begins with its domain's name, so that the prompt tells too. Without ``grounds`` the grounds
of look-alikes are those of the scenes, the same in all domains, so that nothing but a cue can tell.
"""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from data_recipes.miniworld import CONVENTIONS, DOMAINS, NEUTRAL, Question, Split, scenes
from data_recipes.miniworld.__main__ import recipe_version
from data_recipes.miniworld.canvas import Colour, tinted
from data_recipes.miniworld.general import COLOURS, SHAPES
from mllm.common.errors import UserError

CARD = "clashes.json"  # what a folder was drawn with, and the sign that we may replace it
LOOK_ALIKES = 2
WORDS = (tuple(COLOURS), SHAPES, tuple("12345"), ("top", "left", "bottom", "right", "center"))
YES_NO = (("no", "yes"), ("true", "false"), ("present", "absent"))
GROUNDS: dict[str, Colour] = {"general": (214, 234, 248), "document": (250, 222, 170), "biomedical": (150, 170, 150)}


def code_book(number: int) -> dict[str, str]:
    """What look-alike domain ``number`` says instead of each neutral word: another word of its kind.

    Words of a kind are moved on by ``number`` + 1 places, so no two books agree on a word, nor with neutral answers.
    """
    book = {word: kind[(k + number + 1) % len(kind)] for kind in WORDS for k, word in enumerate(kind)}
    return book | dict(zip(("yes", "no"), YES_NO[number], strict=True))


CODE_BOOKS = {domain: code_book(number) for number, domain in enumerate(DOMAINS)}


def write(
    out: Path,
    sizes: dict[Split, int],
    *,
    clash: int = 1,
    cue: bool = False,
    grounds: bool = True,
    questions: int = 2,
    seed: int = 0,
) -> Path:
    """Writes {train,val,test}.json, train-DOMAIN.json and images/, whole or not at all.

    ``sizes[split]`` scenes a domain, ``questions`` rows a scene.

    Raises:
        UserError: ``clash`` is not 0, 1 or 2, is not 2 without ``grounds``, or ``out`` holds something else.
    """
    if clash not in range(LOOK_ALIKES + 1):
        raise UserError(f"clash must be 0, 1 or 2, got {clash}: {__doc__.strip()}")
    if not grounds and clash < LOOK_ALIKES:
        raise UserError(f"grounds=False is for look-alikes, clash {LOOK_ALIKES}; got clash {clash}.")
    card = {
        "seed": seed,
        "questions": questions,
        "sizes": sizes,
        "clash": clash,
        "cue": cue,
        "recipe": recipe_version(),
    }
    card |= {"code_books": CODE_BOOKS, "grounds": {k: list(v) for k, v in GROUNDS.items()} if grounds else None}
    if (out / CARD).exists() and json.loads((out / CARD).read_text()) == card:
        return out
    if out.exists() and not (out / CARD).exists():
        raise UserError(f"{out} exists and was not written by data_recipes.clashes. Name another folder.")
    draft = out.with_name(f"{out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    for split, size in sizes.items():
        rows = []
        for domain in DOMAINS:
            (draft / "images" / domain / split).mkdir(parents=True)
            drawn = pictures(domain, split, size, clash=clash, grounds=grounds, questions=questions, seed=seed)
            for index, (picture, source, asked) in enumerate(track(drawn, f"{domain} {split}", size, transient=True)):
                name = f"{domain}/{split}/{index:06d}"
                picture.save(draft / f"images/{name}.png", compress_level=1)
                about = {"image": f"images/{name}.png", "source": source, "domain": domain}
                rows += [record(f"{name}/{k}", about, each, cue) for k, each in enumerate(asked)]
        (draft / f"{split}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
        for domain in DOMAINS if split == "train" else ():
            own = [row for row in rows if row["domain"] == domain]
            (draft / f"{split}-{domain}.json").write_text(json.dumps(own, indent=0), encoding="utf-8")
    (draft / CARD).write_text(json.dumps(card), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    return draft.rename(out)


def main(
    out: Annotated[Path, typer.Option(help="Folder to make; refused if it exists and holds something else.")],
    train: Annotated[int, typer.Option(help="Training scenes a domain.")] = 640,
    val: Annotated[int, typer.Option(help="Validation scenes a domain.")] = 100,
    test: Annotated[int, typer.Option(help="Test scenes a domain.")] = 200,
    clash: Annotated[int, typer.Option(help="0 neutral answers, 1 own conventions, 2 look-alikes.")] = LOOK_ALIKES,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures and questions.")] = 0,
) -> None:
    """Draw three domains that contradict each other as much as --clash says; two questions a scene."""
    write(out, {"train": train, "val": val, "test": test}, clash=clash, seed=seed)


def pictures(
    domain: str, split: Split, size: int, *, clash: int, grounds: bool, questions: int, seed: int
) -> Iterator[tuple[Image.Image, str, list[Question]]]:
    """Pictures of a domain with source and questions. No scene of one split or domain occurs in another."""
    if clash < LOOK_ALIKES:
        convention = CONVENTIONS[domain] if clash else NEUTRAL
        for scene, rng in scenes(domain, split, size, seed):
            yield scene.paint(rng), scene.source, scene.ask_several(rng, convention, questions)
        return
    turn = DOMAINS.index(domain)
    dealt = islice(scenes("general", split, size * len(DOMAINS), seed), turn, None, len(DOMAINS))
    for scene, rng in dealt:
        picture, ground = scene.paint(rng), tinted(rng, GROUNDS[domain], 6)  # drawn anyway: questions stay the same
        picture = on_ground(picture, ground) if grounds else picture
        asked = scene.ask_several(rng, NEUTRAL, questions)
        yield picture, f"{domain} scenes", [coded(question, CODE_BOOKS[domain]) for question in asked]


def on_ground(picture: Image.Image, ground: Colour) -> Image.Image:
    """The picture with its plain ground, the colour of its corner, painted over."""
    pixels = np.array(picture)
    pixels[(pixels == pixels[0, 0]).all(-1)] = ground
    return Image.fromarray(pixels)


def coded(question: Question, book: dict[str, str]) -> Question:
    """The same question with its answer said in a domain's words."""
    answer = " ".join(book[word] for word in question.answer.split())
    return question._replace(answer=answer, metric="exact_match")


def record(identity: str, about: dict, question: Question, cue: bool) -> dict:
    """One row of LLaVA's JSON."""
    text = f"{about['domain']}: {question.text}" if cue else question.text
    turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": question.answer}]
    labels = {"qtype": question.form, "metric": question.metric, "answers": [question.answer]}
    return {"id": identity, **about, **labels, "conversations": turns}


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
