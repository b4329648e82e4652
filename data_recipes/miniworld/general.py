"""General domain: two to five coloured objects on a plain ground; what, where, how many, which relation."""

import math
from random import Random

from PIL import Image, ImageDraw

from data_recipes.miniworld.canvas import SIZE, Box, Colour, grid_box, tinted
from data_recipes.miniworld.conventions import Convention, viewer_place
from data_recipes.miniworld.scene import Question, Scene, ask

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (235, 200, 30),
    "purple": (140, 60, 170),
    "black": (25, 25, 30),
}
SHAPES = ("ball", "box", "tent", "star", "ring", "cross")
GROUNDS: tuple[Colour, ...] = ((214, 234, 248), (232, 248, 220), (250, 236, 215), (228, 228, 236))
CELLS = tuple((row, column) for row in range(3) for column in range(3))
NEIGHBOURS = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

Thing = tuple[str, str]  # colour, shape


def scene(rng: Random) -> Scene:
    """A scene of objects in different cells of the 3 x 3 grid."""
    cells = sorted(rng.sample(CELLS, rng.randint(2, 5)))
    things = {cell: (rng.choice(tuple(COLOURS)), rng.choice(SHAPES)) for cell in cells}
    listing = ", ".join(f"{colour} {shape} at the {viewer_place(*cell)}" for cell, (colour, shape) in things.items())
    questions = {
        "count": lambda rng, words: _count(rng, words, things),
        "presence": lambda rng, words: _presence(rng, words, things),
        "place": lambda rng, words: _place(rng, words, things),
        "what_at": lambda rng, words: _what_at(rng, things),
        "relation": lambda rng, words: _relation(rng, things),
        "colour": lambda rng, words: _colour(rng, things),
    }
    return Scene("scenes", f"a scene: {listing}", lambda rng: _paint(rng, things), questions, (3, 3, 3, 3, 2, 2))


def _count(rng: Random, words: Convention, things: dict) -> Question:
    colour, shape = rng.choice(list(things.values()))
    what, test = rng.choice(
        (
            (f"{colour} things", lambda thing: thing[0] == colour),
            (plural(shape), lambda thing: thing[1] == shape),
            ("things", lambda thing: True),
        )
    )
    return ask(rng, "count", words.count(sum(map(test, things.values()))), a=what)


def _presence(rng: Random, words: Convention, things: dict) -> Question:
    there = rng.random() < 0.5
    colours, shapes = {c for c, _ in things.values()}, {s for _, s in things.values()}
    if rng.random() < 0.5:
        shape = rng.choice(sorted(shapes) if there else [s for s in SHAPES if s not in shapes])
        what = f"a {shape}"
    else:
        # one object of the grid has at most five colours, so an absent one is always left
        what = f"a {rng.choice(sorted(colours) if there else [c for c in COLOURS if c not in colours])} thing"
    return ask(rng, "presence", words.presence[not there], words.presence_metric, a=what)


def _unique(things: dict) -> dict[Thing, tuple[int, int]]:
    """The things that a colour and a shape name without doubt, with their cells."""
    named = list(things.values())
    return {thing: cell for cell, thing in things.items() if named.count(thing) == 1}


def _place(rng: Random, words: Convention, things: dict) -> Question:
    unique = _unique(things)
    if not unique:
        return _count(rng, words, things)
    (colour, shape), cell = rng.choice(list(unique.items()))
    return ask(rng, "place", words.place(*cell), a=f"{colour} {shape}")


def _what_at(rng: Random, things: dict) -> Question:
    cell, (colour, shape) = rng.choice(list(things.items()))
    return ask(rng, "what_at", f"{colour} {shape}", a=viewer_place(*cell))


def _relation(rng: Random, things: dict) -> Question:
    """Asks for the direct neighbour of a thing where there is one, else what stands at a place."""
    pairs = [
        (thing, words, things[(cell[0] + step[0], cell[1] + step[1])])
        for thing, cell in _unique(things).items()
        for words, step in NEIGHBOURS.items()
        if (cell[0] + step[0], cell[1] + step[1]) in things
    ]
    if not pairs:
        return _what_at(rng, things)
    (colour, shape), words, (other_colour, other_shape) = rng.choice(pairs)
    return ask(rng, "relation", f"{other_colour} {other_shape}", a=f"{colour} {shape}", b=words)


def _colour(rng: Random, things: dict) -> Question:
    shapes = [shape for _, shape in things.values()]
    single = [(colour, shape) for colour, shape in things.values() if shapes.count(shape) == 1]
    if not single:
        return _what_at(rng, things)
    colour, shape = rng.choice(single)
    return ask(rng, "colour", colour, a=shape)


def plural(noun: str) -> str:
    """boxes, crosses, balls."""
    return f"{noun}es" if noun.endswith(("x", "s")) else f"{noun}s"


def _paint(rng: Random, things: dict) -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), tinted(rng, rng.choice(GROUNDS), 6))
    draw = ImageDraw.Draw(picture)
    for cell, (colour, shape) in things.items():
        paint_shape(draw, shape, grid_box(rng, cell, rng.randint(20, 26)), tinted(rng, COLOURS[colour]))
    return picture


def paint_shape(draw: ImageDraw.ImageDraw, shape: str, box: Box, fill: Colour) -> None:
    """One filled shape inside a square box."""
    left, top, right, bottom = box
    middle, size = (left + right) / 2, right - left
    if shape == "ball":
        draw.ellipse(box, fill=fill)
    elif shape == "box":
        draw.rectangle(box, fill=fill)
    elif shape == "tent":
        draw.polygon([(middle, top), (right, bottom), (left, bottom)], fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=round(size / 5))
    elif shape == "cross":
        draw.rectangle((middle - size / 8, top, middle + size / 8, bottom), fill=fill)
        draw.rectangle((left, top + size * 3 / 8, right, bottom - size * 3 / 8), fill=fill)
    elif shape == "star":
        centre = (top + bottom) / 2
        corners = [(size / (2 if k % 2 == 0 else 4.5), math.pi * (k / 5 - 0.5)) for k in range(10)]
        draw.polygon([(middle + r * math.cos(a), centre + r * math.sin(a)) for r, a in corners], fill=fill)
    else:
        raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
