"""Reads colours, shapes and places back from pictures of miniworld's general domain, and holds them against a text.

    facts = read_scene(picture)                       # {(0, 1): ("red", "ball"), …}
    score = score_picture(picture, "a scene: red ball at the top, blue box at the left")

No learning: per cell of the 3 x 3 grid, what differs from the ground is an object; its colour is the nearest one of the
palette, its shape the mask that covers most of the same pixels. Meant for generated pictures, so it reads what is there
and does not guess what might have been meant. H, W pixels.
"""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from data_recipes.miniworld.canvas import SIZE
from data_recipes.miniworld.conventions import viewer_place
from data_recipes.miniworld.general import CELLS, COLOURS, SHAPES, paint_shape

CELL = SIZE // 3
SMALLEST = 40  # pixels of an object: a star of 20 pixels has some 130
TEMPLATE = 24  # pixels a side that masks are compared at
FACT = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the ([a-z ]+)")

Cell = tuple[int, int]
Facts = dict[Cell, tuple[str, str]]


@dataclass(frozen=True)
class Score:
    """How many objects of a caption a picture shows in the right colour, shape, and both; and how many nobody named."""

    objects: int
    colours: int
    shapes: int
    both: int
    extra: int

    def __add__(self, other: "Score") -> "Score":
        mine, theirs = vars(self), vars(other)
        return Score(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def share(self) -> float:
        """Of the objects that were named or drawn, those drawn as named."""
        return self.both / max(self.objects + self.extra, 1)


def read_scene(picture: Image.Image) -> Facts:
    """(row, column) -> (colour, shape) of every cell that shows an object."""
    pixels_HW3 = np.asarray(picture.convert("RGB").resize((SIZE, SIZE)), dtype=np.float64)
    ground_3 = _ground(pixels_HW3)
    found: Facts = {}
    for row, column in CELLS:
        cell = pixels_HW3[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        thing = _read_cell(cell, ground_3)
        if thing is not None:
            found[row, column] = thing
    return found


def read_caption(caption: str) -> Facts:
    """The same of a caption, in miniworld's words."""
    places = {viewer_place(*cell): cell for cell in CELLS}
    facts = ((FACT.fullmatch(fact.strip())) for fact in caption.partition(":")[2].split(","))
    return {places[fact[3]]: (fact[1], fact[2]) for fact in facts if fact and fact[3] in places}


def score_picture(picture: Image.Image, caption: str) -> Score:
    """A picture against the text it should show."""
    shown, wanted = read_scene(picture), read_caption(caption)
    pairs = [(shown.get(cell, ("", "")), thing) for cell, thing in wanted.items()]
    return Score(
        objects=len(wanted),
        colours=sum(seen[0] == thing[0] for seen, thing in pairs),
        shapes=sum(seen[1] == thing[1] for seen, thing in pairs),
        both=sum(seen == thing for seen, thing in pairs),
        extra=sum(cell not in wanted for cell in shown),
    )


def _ground(pixels_HW3: np.ndarray) -> np.ndarray:
    """The plain ground's colour: the median of the lines between cells and of the rim, where no object reaches."""
    lines = [0, CELL - 1, CELL, 2 * CELL - 1, 2 * CELL, SIZE - 1]
    return np.median(np.concatenate([pixels_HW3[lines].reshape(-1, 3), pixels_HW3[:, lines].reshape(-1, 3)]), axis=0)


def _read_cell(cell_HW3: np.ndarray, ground_3: np.ndarray) -> tuple[str, str] | None:
    is_object_HW = np.abs(cell_HW3 - ground_3).max(-1) > 50  # levels of 256; grounds are pale, colours at least 60 off
    if is_object_HW.sum() < SMALLEST:
        return None
    colour_3 = np.median(cell_HW3[is_object_HW], axis=0)
    distances = {name: np.abs(colour_3 - np.array(colour)).sum() for name, colour in COLOURS.items()}
    ys, xs = is_object_HW.nonzero()
    box = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    shape_mask = Image.fromarray(is_object_HW[box].astype(np.uint8) * 255)
    mask = np.asarray(shape_mask.resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)) > 127
    return min(distances, key=distances.get), max(SHAPES, key=lambda shape: _overlap(mask, _template(shape)))


def _overlap(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    return (one_HW & other_HW).sum() / (one_HW | other_HW).sum()


@cache
def _template(shape: str) -> np.ndarray:
    """bool [24, 24] the shape, filling the square."""
    canvas = Image.new("L", (64, 64))
    paint_shape(ImageDraw.Draw(canvas), shape, (8, 8, 48, 48), 255)
    ys, xs = np.asarray(canvas).nonzero()
    whole = canvas.crop((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return np.asarray(whole.resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)) > 127
