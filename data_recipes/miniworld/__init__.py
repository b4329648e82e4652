"""Miniworld: three small domains drawn and annotated from a seed, with exact answers and no download.

*general* shows scenes of coloured objects, *document* shows rendered text and charts, *biomedical* shows smears and
radiographs. Pictures are 96 x 96 pixels. The domains share question forms and visual primitives and disagree about
the answers (see ``conventions``), as real domains do; this is what sparse experts are meant to survive.

A scene belongs to a split by the hash of its caption, which states everything in the picture, so no scene of one
split can be drawn in another.
"""

import zlib
from collections.abc import Iterator
from random import Random
from typing import Literal

from data_recipes.miniworld import biomedical, document, general
from data_recipes.miniworld.conventions import CONVENTIONS, NEUTRAL
from data_recipes.miniworld.scene import Question, Scene

Split = Literal["train", "val", "test"]

DRAW = {"general": general.scene, "document": document.scene, "biomedical": biomedical.scene}
DOMAINS = tuple(DRAW)

__all__ = ["CONVENTIONS", "DOMAINS", "NEUTRAL", "Question", "Scene", "Split", "draw_scene", "scenes", "split_of"]


def split_of(caption: str) -> Split:
    """The split a scene belongs to: a tenth of all captions is ``test``, a tenth ``val``, the rest ``train``."""
    return ("test", "val", "train")[min(zlib.crc32(caption.encode()) % 10, 2)]


def draw_scene(domain: str, split: Split, index: int, seed: int = 0) -> tuple[Scene, Random]:
    """Scene number ``index`` of a domain's split, and the random generator to paint and question it with.

    A pure function of its arguments: facts are drawn until the caption falls into the split, which costs about ten
    draws for the small splits and is cheap, since nothing is painted before.
    """
    rng = Random(f"miniworld/{seed}/{domain}/{split}/{index}")
    while True:
        scene = DRAW[domain](rng)
        if split_of(scene.caption) == split:
            return scene, rng


def scenes(domain: str, split: Split, count: int, seed: int = 0) -> Iterator[tuple[Scene, Random]]:
    """``count`` scenes with different captions (a caption drawn twice is passed over)."""
    seen: set[str] = set()
    index = 0
    while len(seen) < count:
        scene, rng = draw_scene(domain, split, index, seed)
        index += 1
        if scene.caption not in seen:
            seen.add(scene.caption)
            yield scene, rng
