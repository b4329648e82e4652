"""Keeps what a benchmark measured beside the commit and the device it was measured on."""

import json
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict:
    """Date, commit (marked where the tree was changed) and device of a run."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), platform.machine())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    return {"date": date.today().isoformat(), "commit": commit, "device": device, "torch": torch.__version__}


def store(name: str, figures: dict) -> Path:
    """Writes ``results/<name>.json``."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(provenance() | {"figures": figures}, indent=2) + "\n", encoding="utf-8")
    return path
