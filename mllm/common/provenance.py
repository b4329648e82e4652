"""What a figure was measured with: date, commit, device, versions."""

import os
import platform
import subprocess
import tomllib
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "open_clip_torch")
PRODUCT = "mllm-experts"  # the name in pyproject.toml
PACKAGE = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, str]:
    """Date, commit (see `commit`), device and versions."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "device": device(),
        **{library: version(library) for library in LIBRARIES},
    }


def commit(package: Path = PACKAGE) -> str:
    """The commit of the checkout that a package of ours is run from, marked "-dirty" where the tree was changed.

    Outside a checkout of this project the package's version, as "v0.1.0": a repository that happens to lie around it,
    such as one that a virtual environment was made in, says nothing about it. "unknown" without either.
    """
    root = package.parent
    top = git("rev-parse", "--show-toplevel", at=package)
    if top is not None and Path(top).resolve() == root and project_name(root) == PRODUCT:
        return git("describe", "--always", "--dirty", at=package) or "unknown"
    try:
        return f"v{version(PRODUCT)}"
    except PackageNotFoundError:
        return "unknown"


def git(*words: str, at: Path) -> str | None:
    """What a git command says in a folder, or None where it fails or there is no git."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's name another
    try:
        said = subprocess.run(["git", *words], cwd=at, env=own, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()


def project_name(root: Path) -> str | None:
    """The name in a folder's pyproject.toml, if there is one."""
    try:
        return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("project", {}).get("name")
    except (OSError, ValueError):
        return None


def device() -> str:
    """The GPU's name, or the processor's with the number of threads torch uses."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"
