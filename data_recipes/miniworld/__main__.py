"""Writes miniworld as ordinary LLaVA JSON with images: ``python -m data_recipes.miniworld --out runs/miniworld``."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from data_recipes.miniworld import CONVENTIONS, DOMAINS, NEUTRAL, Question, Split, scenes
from mllm.common.errors import UserError

CARD = "miniworld.json"  # what a folder was drawn with, and the sign that we may replace it
SHORT = {"train": 2500, "val": 100, "test": 300}


def main(
    out: Annotated[Path, typer.Option(help="Folder to make; refused if it exists and holds something else.")],
    train: Annotated[int, typer.Option(help="Training scenes a domain.")] = SHORT["train"],
    val: Annotated[int, typer.Option(help="Validation scenes a domain.")] = SHORT["val"],
    test: Annotated[int, typer.Option(help="Test scenes a domain.")] = SHORT["test"],
    questions: Annotated[int, typer.Option(help="Questions a scene, a row each.")] = 2,
    train_turns: Annotated[
        int, typer.Option(help="Questions a training scene, as turns of one row, like LLaVA's own data; 0: a row each.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures and questions.")] = 0,
    neutral: Annotated[bool, typer.Option(help="Neutral answers in all domains, as the base was taught.")] = False,
) -> None:
    """Draw the three domains and write {train,val,test}.json, captions.json and images/."""
    sizes: dict[Split, int] = {"train": train, "val": val, "test": test}
    write(out, sizes, questions=questions, train_turns=train_turns, seed=seed, neutral=neutral)


def write(
    out: Path,
    sizes: dict[Split, int],
    *,
    questions: int = 2,
    train_turns: int = 0,
    seed: int = 0,
    neutral: bool = False,
) -> Path:
    """Writes ``sizes[split]`` scenes a domain, whole or not at all (drawn beside ``out``, then renamed).

    ``captions.json`` holds the dense captions of the training scenes, for a projector alignment run.
    """
    card = {"seed": seed, "questions": questions, "train_turns": train_turns, "sizes": sizes, "neutral": neutral}
    card["recipe"] = recipe_version()
    conventions = dict.fromkeys(DOMAINS, NEUTRAL) if neutral else CONVENTIONS
    if (out / CARD).exists() and json.loads((out / CARD).read_text()) == card:
        return out
    if out.exists() and not (out / CARD).exists():
        raise UserError(f"{out} exists and was not written by miniworld. Name another folder with --out.")
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    for split, size in sizes.items():
        rows: list[dict] = []
        captions: list[dict] = []
        for domain in DOMAINS:
            (draft / "images" / domain / split).mkdir(parents=True)
            drawn = track(scenes(domain, split, size, seed), f"drawing {domain} {split}", total=size, transient=True)
            for index, (scene, rng) in enumerate(drawn):
                identity = f"{domain}-{split}-{index:06d}"
                image = f"images/{domain}/{split}/{index:06d}.png"
                scene.paint(rng).save(draft / image, compress_level=1)
                about = {"image": image, "source": scene.source, "domain": domain}
                captions.append(_record(f"{identity}-caption", about, [("Describe the picture.", scene.caption)]))
                turns = train_turns if split == "train" else 0
                asked = scene.ask_several(rng, conventions[domain], turns or questions)
                if turns:
                    rows.append(_record(identity, about, [(question.text, question.answer) for question in asked]))
                else:
                    rows += _question_records(identity, about, asked)
        (draft / f"{split}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
        if split == "train":
            (draft / "captions.json").write_text(json.dumps(captions, indent=0), encoding="utf-8")
    (draft / CARD).write_text(json.dumps(card), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    return draft.rename(out)


def recipe_version() -> str:
    """A hash of the code that draws, so that a folder drawn by older code is not taken for the same."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _question_records(identity: str, about: dict, questions: list[Question]) -> list[dict]:
    return [
        _record(f"{identity}-{k}", about | {"qtype": form, "metric": metric, "answers": [answer]}, [(text, answer)])
        for k, (form, text, answer, metric) in enumerate(questions)
    ]


def _record(identity: str, about: dict, exchanges: list[tuple[str, str]]) -> dict:
    turns = [
        {"from": side, "value": text}
        for exchange in exchanges
        for side, text in zip(("human", "gpt"), exchange, strict=True)
    ]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": identity, **about, "conversations": turns}


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
