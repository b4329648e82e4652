"""Studies without a model: scores made up from the arm, to try what is around the trainings; and rows for real ones.

N samples: two domains of twelve pictures with two questions each.
"""

import json
from pathlib import Path

import numpy as np
import yaml

from studies.conflict.config import ConflictConfig, load_conflict_config
from studies.conflict.study import Job, Study
from tests.tiny import tiny_image

DOMAIN_N = np.repeat(["document", "general"], 24)
PICTURE_N = np.arange(48) // 2
COLOURS = ("red", "green", "blue")
ANSWERS = {"general": dict(zip(COLOURS, COLOURS, strict=True)), "document": {"red": "0", "green": "1", "blue": "2"}}
FACTS = {
    "base": "base",
    "domains": ["document", "general"],
    "rows": {split: {"document": 24, "general": 24} for split in ("train", "val", "test")},
    "twice": "new samples",
    "test_pictures_seen_in_training": 0,
    "data": {"train": "t", "val": "v", "test": "e"},
    "data_twice": "tt",
}
SHARES = {"single": 0.9, "mix": 0.5, "wide": 0.55, "mole": 0.7, "mole_frozen": 0.5}


def toy_config(folder: Path, **run: object) -> ConflictConfig:
    """A config of files that nobody reads; `run` goes over arms and sizes."""
    run = {"arms": ["single", "mix", "wide", "mole"], "lrs": [1e-3, 1e-2], "seeds": 3, "out": str(folder)} | run
    path = folder / "toy.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"data": dict.fromkeys(("train", "val", "test"), "rows.json"), "run": run}))
    return load_conflict_config(path)


class ToyWorker:
    """Stands for `work.Worker`: an arm's answers are right as often as SHARES has it, better at 1e-2."""

    def __init__(self, folder: Path, shares: dict[str, float] = SHARES, **run: object) -> None:
        self.study, self.shares, self.jobs = Study(toy_config(folder, **run), FACTS), shares, []

    def run(self, job: Job) -> tuple[dict, dict]:
        self.jobs.append(job)
        rng = np.random.default_rng([job.seed, len(job.arm.name)])
        share = self.shares[job.arm.name] - (0.1 if job.rate < 1e-2 else 0.0)
        exact_N = rng.random(48) < share
        record = {
            "arm": job.arm.name,
            "seed": job.seed,
            "split": job.split,
            "recipe": self.study.recipe(job),
            "exact": share,
            "loss": 1 - share,
            "cost": dict.fromkeys(("flops", "needed_flops", "active_parameters", "trained_parameters"), 1e3),
            "routing": None,
            "seconds": 1.0,
            "peak_mib": None,
            "made": {"date": "2020-01-01", "commit": "abc", "device": "toy"},
        }
        columns = {"domain": DOMAIN_N, "source": DOMAIN_N, "picture": PICTURE_N}
        return record, columns | {"exact": exact_N, "loss": 1.0 - exact_N}


def write_rows(folder: Path, name: str, copies: int = 2, **tags: str) -> Path:
    """Colour questions that two domains answer in different words; `tags` go over each record's own."""
    rows = []
    for domain, answers in ANSWERS.items():
        for number in range(copies * len(COLOURS)):
            colour = COLOURS[number % len(COLOURS)]
            picture = f"{name}-{domain}-{number}.png"
            tiny_image(colour).save(folder / picture)
            words = ("<image>\nWhat colour is the square?", answers[colour])
            turns = [{"from": side, "value": text} for side, text in zip(("human", "gpt"), words, strict=True)]
            row = {"id": f"{domain}-{number}", "image": picture, "domain": domain, "source": f"{domain}-squares"}
            rows.append({key: value for key, value in (row | tags).items() if value} | {"conversations": turns})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows))
    return path
