"""Writes miniworld as ordinary LLaVA JSON with images: ``python -m data_recipes.miniworld --out runs/miniworld``."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from data_recipes.miniworld import CONVENTIONS, DOMAINS, Split, scenes

SHORT = {"train": 2500, "val": 100, "test": 300}


def main(
    out: Annotated[Path, typer.Option(help="Folder to make; refused if it exists and holds something else.")],
    train: Annotated[int, typer.Option(help="Training scenes a domain.")] = SHORT["train"],
    val: Annotated[int, typer.Option(help="Validation scenes a domain.")] = SHORT["val"],
    test: Annotated[int, typer.Option(help="Test scenes a domain.")] = SHORT["test"],
    questions: Annotated[int, typer.Option(help="Questions a scene.")] = 2,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures and questions.")] = 0,
) -> None:
    """Draw the three domains and write {train,val,test}.json, captions.json and images/."""
    write(out, {"train": train, "val": val, "test": test}, questions=questions, seed=seed)


def write(out: Path, sizes: dict[Split, int], *, questions: int = 2, seed: int = 0) -> Path:
    """Writes ``sizes[split]`` scenes a domain, whole or not at all (drawn beside ``out``, then renamed).

    ``captions.json`` holds the dense captions of the training scenes, for a projector alignment run.
    """
    card = {"seed": seed, "questions": questions, "sizes": sizes}
    if (out / "card.json").exists() and json.loads((out / "card.json").read_text()) == card:
        return out
    if out.exists() and not (out / "card.json").exists():
        raise FileExistsError(f"{out} exists and was not written by miniworld. Name another folder with --out.")
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    captions: list[dict] = []
    for split, size in sizes.items():
        rows = [
            row
            for domain in DOMAINS
            for row in _write_domain(draft, domain, split, size, questions, seed, captions if split == "train" else [])
        ]
        (draft / f"{split}.json").write_text(json.dumps(rows, indent=0))
    (draft / "captions.json").write_text(json.dumps(captions, indent=0))
    (draft / "card.json").write_text(json.dumps(card))
    shutil.rmtree(out, ignore_errors=True)
    return draft.rename(out)


def _write_domain(
    root: Path, domain: str, split: Split, size: int, questions: int, seed: int, captions: list[dict]
) -> list[dict]:
    folder = root / "images" / domain / split
    folder.mkdir(parents=True)
    rows = []
    drawn = track(scenes(domain, split, size, seed), f"drawing {domain} {split}", total=size, transient=True)
    for index, (scene, rng) in enumerate(drawn):
        name = f"images/{domain}/{split}/{index:06d}.png"
        scene.paint(rng).save(root / name, compress_level=1)
        about = {"image": name, "source": scene.source, "domain": domain}
        captions.append(_record(f"{domain}-{split}-{index}-caption", about, "Describe the picture.", scene.caption))
        for k, question in enumerate(scene.ask_several(rng, CONVENTIONS[domain], questions)):
            graded = {"qtype": question.form, "metric": question.metric, "answers": [question.answer]}
            identity = f"{domain}-{split}-{index}-{k}"
            rows.append(_record(identity, about | graded, question.text, question.answer))
    return rows


def _record(identity: str, about: dict, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": identity, **about, "conversations": turns}


if __name__ == "__main__":
    typer.run(main)
