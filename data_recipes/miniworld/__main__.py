"""Writes miniworld as ordinary LLaVA JSON with images: ``python -m data_recipes.miniworld --out runs/miniworld``."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from data_recipes.miniworld import CONVENTIONS, DOMAINS, NEUTRAL, Question, Split, scenes

SHORT = {"train": 2500, "val": 100, "test": 300}


def main(
    out: Annotated[Path, typer.Option(help="Folder to make; refused if it exists and holds something else.")],
    train: Annotated[int, typer.Option(help="Training scenes a domain.")] = SHORT["train"],
    val: Annotated[int, typer.Option(help="Validation scenes a domain.")] = SHORT["val"],
    test: Annotated[int, typer.Option(help="Test scenes a domain.")] = SHORT["test"],
    questions: Annotated[int, typer.Option(help="Questions a scene.")] = 2,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures and questions.")] = 0,
    neutral: Annotated[bool, typer.Option(help="Neutral answers in all domains, as the base was taught.")] = False,
) -> None:
    """Draw the three domains and write {train,val,test}.json, captions.json and images/."""
    write(out, {"train": train, "val": val, "test": test}, questions=questions, seed=seed, neutral=neutral)


def write(out: Path, sizes: dict[Split, int], *, questions: int = 2, seed: int = 0, neutral: bool = False) -> Path:
    """Writes ``sizes[split]`` scenes a domain, whole or not at all (drawn beside ``out``, then renamed).

    ``captions.json`` holds the dense captions of the training scenes, for a projector alignment run.
    """
    card = {"seed": seed, "questions": questions, "sizes": sizes, "neutral": neutral}
    conventions = dict.fromkeys(DOMAINS, NEUTRAL) if neutral else CONVENTIONS
    if (out / "card.json").exists() and json.loads((out / "card.json").read_text()) == card:
        return out
    if out.exists() and not (out / "card.json").exists():
        raise FileExistsError(f"{out} exists and was not written by miniworld. Name another folder with --out.")
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
                captions.append(_record(f"{identity}-caption", about, "Describe the picture.", scene.caption))
                rows += _question_records(identity, about, scene.ask_several(rng, conventions[domain], questions))
        (draft / f"{split}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
        if split == "train":
            (draft / "captions.json").write_text(json.dumps(captions, indent=0), encoding="utf-8")
    (draft / "card.json").write_text(json.dumps(card), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    return draft.rename(out)


def _question_records(identity: str, about: dict, questions: list[Question]) -> list[dict]:
    return [
        _record(f"{identity}-{k}", about | {"qtype": form, "metric": metric, "answers": [answer]}, text, answer)
        for k, (form, text, answer, metric) in enumerate(questions)
    ]


def _record(identity: str, about: dict, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": identity, **about, "conversations": turns}


if __name__ == "__main__":
    typer.run(main)
