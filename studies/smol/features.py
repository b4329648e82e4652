"""What the frozen tower sees in each picture, computed once and kept: bfloat16 `[N, P, D]`, N pictures, P tokens."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm.data.images import open_image

CHUNK = 256  # pictures a file: what a cut-off run has to do again


class Features:
    """Features by a picture's key, standardised by channel with the statistics of all of them.

    Attributes:
        mean, std: float32 `[D]`; `fold` undoes them in a projector's first layer.
    """

    def __init__(self, folder: Path) -> None:
        self._place: dict[str, tuple[int, int]] = {}
        self._chunks: list[Tensor] = []
        for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
            self._chunks.append(load_file(path)["features"])
            keys = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            self._place |= {key: (number, row) for row, key in enumerate(keys)}
        sample = torch.cat([chunk[::8].flatten(0, 1) for chunk in self._chunks]).float()
        self.mean, self.std = sample.mean(0), sample.std(0).clamp_min(1e-3)

    def __call__(self, keys: list[str]) -> Tensor:
        """float32 `[N, P, D]`."""
        rows = [self._chunks[number][row] for number, row in (self._place[key] for key in keys)]
        return (torch.stack(rows).float() - self.mean) / self.std


def pictures(
    folder: Path, keys: list[str], drawn: Iterator[tuple[str, Image.Image]]
) -> Iterator[tuple[str, Image.Image]]:
    """Photographs by path, then what was drawn."""
    for key in keys:
        yield key, open_image(folder / key, where=key)
    yield from drawn


@torch.no_grad()
def keep_features(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    shown: Iterator[tuple[str, Image.Image]],
    total: int,
    folder: Path,
) -> None:
    """Computes the features of all pictures that are not in `folder` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    for path in folder.glob("*.json"):
        known |= set(json.loads(path.read_text(encoding="utf-8")))
    keys, kept = [], []

    def write() -> None:
        path = folder / f"{len(list(folder.glob('*.json'))):04d}.safetensors"
        part = path.with_suffix(".part")
        save_file({"features": torch.cat(kept)}, part)
        os.replace(part, path)
        path.with_suffix(".json").write_text(json.dumps(keys), encoding="utf-8")
        keys.clear()
        kept.clear()

    for key, picture in track(shown, "features", total=total):
        if key in known:
            continue
        pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
        kept.append(model.model.vision_tower(pixels.to(model.dtype)).last_hidden_state)
        keys.append(key)
        if len(keys) == CHUNK:
            write()
    if keys:
        write()
