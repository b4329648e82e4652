"""A few questions with pictures, as LLaVA JSON."""

import json
from pathlib import Path

from tests.tiny import tiny_image

COLOURS = ["red", "blue", "green", "white", "black", "yellow", "purple"]
QUESTIONS = ["What colour?", "How many cells are there, and how many squares?", "Total?"]
DOMAINS = ["general", "document"]


def write_questions(folder: Path, name: str = "test.json") -> Path:
    """Seven rows of different lengths in two domains; the last has no picture."""
    rows = []
    for number, colour in enumerate(COLOURS):
        domain, question = DOMAINS[number % len(DOMAINS)], QUESTIONS[number % len(QUESTIONS)]
        seen = number < len(COLOURS) - 1
        if seen:
            tiny_image(colour).save(folder / f"{colour}.png")
        turns = [{"from": "human", "value": "<image>\n" * seen + question}, {"from": "gpt", "value": colour}]
        about = {"source": f"{domain}-squares", "domain": domain, "metric": "exact_match", "answers": [colour]}
        image = {"image": f"{colour}.png"} if seen else {}
        rows.append({"id": f"row-{number}", "conversations": turns} | image | about)
    (folder / name).write_text(json.dumps(rows))
    return folder / name
