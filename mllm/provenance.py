"""What a figure was measured with: date, commit, device, versions."""

import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "open_clip_torch")


def provenance() -> dict[str, str]:
    """Date, commit (marked "-dirty" where the tree was changed, "unknown" outside a checkout), device and versions."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "device": device(),
        **{library: version(library) for library in LIBRARIES},
    }


def commit() -> str:
    """The commit of the checkout this package is run from."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def device() -> str:
    """The GPU's name, or the processor's with the number of threads torch uses."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"
