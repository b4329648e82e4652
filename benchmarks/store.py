"""Keeps what a benchmark measured beside the commit and the device it was measured on."""

import json
from pathlib import Path

from mllm.common.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def store(name: str, figures: dict) -> Path:
    """Writes ``results/<name>.json``."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(provenance() | {"figures": figures}, indent=2) + "\n", encoding="utf-8")
    return path
