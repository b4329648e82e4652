"""A data set on disk small enough to train on in seconds: colour questions with a picture, number questions without."""

import json
from pathlib import Path

from tests.tiny import tiny_image, write_tiny_llava

COLOURS = ("red", "green", "blue", "black")


def write_rows(folder: Path, rows: int = 64) -> Path:
    """train.json, images/ and mixture.yaml; every second pair of rows is text only. Returns the mixture."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        tiny_image(colour).save(folder / "images" / f"{colour}.png")
    (folder / "train.json").write_text(json.dumps([make_row(number) for number in range(rows)]), encoding="utf-8")
    (folder / "mixture.yaml").write_text("sources:\n  - {path: train.json, image_root: images}\n", encoding="utf-8")
    return folder / "mixture.yaml"


def make_row(number: int) -> dict:
    if number % 2:
        question, answer = f"Is {number} more than 9?", "yes" if number > 9 else "no"
        picture = {}
    else:
        colour = COLOURS[number // 2 % len(COLOURS)]
        question, answer, picture = "<image>\nWhat colour?", colour, {"image": f"{colour}.png"}
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "domain": "pictures" if picture else "numbers", "conversations": turns, **picture}


def write_config(folder: Path, **settings: str) -> Path:
    """A base, data and a MoLE stage of five steps on them; settings such as `stage` replace whole sections."""
    write_tiny_llava(folder / "base")
    sections = {
        "stage": "instruct",
        "model": f"{{path: '{folder}/base', adapter: {{type: mole, r: 4, num_experts: 3}}, dtype: fp32}}",
        "data": f"{{mixture: '{write_rows(folder)}', workers: 0}}",
        "optim": "{lr: 1.0e-2}",
        "run": f"{{output_dir: '{folder}/run', steps: 5, batch_size: 8, micro_batch_size: 2, log_every: 1}}",
        "deepspeed": "{zero: 2}",
    } | settings
    path = folder / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in sections.items()), encoding="utf-8")
    return path
