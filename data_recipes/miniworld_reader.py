"""Reads colours, shapes and places back from pictures of miniworld's general domain, and holds them against a text.

    facts = read_scene(picture)                       # {(0, 1): ("red", "ball"), …}
    score = score_picture(picture, "a scene: red ball at the top, blue box at the left")

No learning: per cell of the 3 x 3 grid, what differs from the ground is an object; its colour is the one of the palette
nearest to its core, its shape that of the nearest template, sharp or a little soft as generated pictures are. It reads
what is there and does not guess what might have been meant. H, W pixels.
"""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_recipes.miniworld.canvas import SIZE
from data_recipes.miniworld.conventions import viewer_place
from data_recipes.miniworld.general import CELLS, COLOURS, SHAPES, paint_shape

CELL = SIZE // 3
SMALLEST = 40  # pixels of an object: a star of 20 pixels has some 130
TEMPLATE = 24  # pixels a side that forms are compared at
BLURS = (0.0, 0.8, 1.4)  # pixels: generated pictures are a little soft
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
    difference_HW = np.abs(cell_HW3 - ground_3).max(-1)
    is_object_HW = difference_HW > 50  # levels of 256; grounds are pale, colours at least 60 off
    if is_object_HW.sum() < SMALLEST:
        return None
    core = np.percentile(difference_HW[is_object_HW], 75)
    colour_3 = np.median(cell_HW3[difference_HW >= core], axis=0)
    distances = {name: np.abs(colour_3 - np.array(colour)).sum() for name, colour in COLOURS.items()}
    form = _form(difference_HW / core)
    return min(distances, key=distances.get), min(SHAPES, key=lambda shape: _distance(form, shape))


def _form(share_HW: np.ndarray) -> np.ndarray:
    """float [24, 24] how much of the object each pixel holds, the box around its half filling the square."""
    ys, xs = (share_HW > 0.5).nonzero()
    box = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    form = Image.fromarray(share_HW[box].clip(0, 1).astype(np.float32))
    return np.asarray(form.resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR))


def _distance(form: np.ndarray, shape: str) -> float:
    """To the nearest of the shape's templates, soft and sharp."""
    return min(np.abs(form - _template(shape, blur)).mean() for blur in BLURS)


@cache
def _template(shape: str, blur: float) -> np.ndarray:
    """float [24, 24] a shape of common size, as soft as a Gaussian of so many pixels makes it."""
    canvas = Image.new("L", (4 * CELL, 4 * CELL))
    paint_shape(ImageDraw.Draw(canvas), shape, (4 * 6, 4 * 6, 4 * 26, 4 * 26), 255)
    small = canvas.resize((CELL, CELL), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(blur))
    share_HW = np.asarray(small, dtype=np.float64)
    return _form(share_HW / np.percentile(share_HW[share_HW > 50], 75))
