"""Biomedical domain: blood smears and chest radiographs; how many, present or absent, which cell, where.

Sides in answers are the patient's, as radiologists give them: what lies left in the picture is on the right.
"""

from random import Random

from PIL import Image, ImageDraw

from data_recipes.miniworld.canvas import Box, Colour, grid_box, noise_tile, speckled, tinted
from data_recipes.miniworld.conventions import Convention, viewer_place
from data_recipes.miniworld.scene import Question, Scene, ask

CELLS = ("red cell", "lymphocyte", "neutrophil", "platelet", "bacillus")
FINDINGS = ("nodule", "effusion", "fracture", "clip")
PLURALS = {"bacillus": "bacilli"}
SMEAR = noise_tile(1, (246, 222, 226), 5)
FILM = noise_tile(2, (22, 22, 24), 5)
PURPLE: Colour = (96, 50, 140)
PINK: Colour = (222, 130, 140)
PLACES = tuple((row, column) for row in range(3) for column in range(3))
ZONES = tuple((row, column) for row in range(3) for column in (0, 2))


def scene(rng: Random) -> Scene:
    """A smear or a radiograph."""
    return rng.choice((_smear, _radiograph))(rng)


def _smear(rng: Random) -> Scene:
    places = sorted(rng.sample(PLACES, rng.randint(2, 6)))
    kinds = rng.sample(CELLS, 3)  # few kinds at a time, so that a kind has a count
    cells = {place: rng.choice(kinds) for place in places}
    caption = "a smear: " + ", ".join(f"{cell} at the {viewer_place(*place)}" for place, cell in cells.items())
    return Scene(
        "smears", caption, lambda rng: _paint_smear(rng, cells), _questions(cells, CELLS, "cells"), (3, 3, 3, 3)
    )


def _radiograph(rng: Random) -> Scene:
    zones = sorted(rng.sample(ZONES, rng.randint(2, 5)))
    findings = {zone: rng.choice(FINDINGS) for zone in zones}
    listing = ", ".join(f"{finding} at the {viewer_place(*zone)}" for zone, finding in findings.items())
    caption = f"a radiograph: {listing}"
    questions = _questions(findings, FINDINGS, "findings")
    return Scene("radiographs", caption, lambda rng: _paint_radiograph(rng, findings), questions, (3, 3, 3, 3))


def _questions(things: dict, known: tuple[str, ...], plural_of_all: str) -> dict:
    return {
        "count": lambda rng, words: _count(rng, words, things, plural_of_all),
        "presence": lambda rng, words: _presence(rng, words, things, known),
        "place": lambda rng, words: _place(rng, words, things),
        "what_at": lambda rng, words: _what_at(rng, things),
    }


def _count(rng: Random, words: Convention, things: dict, plural_of_all: str) -> Question:
    if rng.random() < 0.5:
        return ask(rng, "count", words.count(len(things)), a=plural_of_all)
    kind = rng.choice(list(things.values()))
    return ask(rng, "count", words.count(list(things.values()).count(kind)), a=PLURALS.get(kind, f"{kind}s"))


def _presence(rng: Random, words: Convention, things: dict, known: tuple[str, ...]) -> Question:
    shown = set(things.values())
    absent = [kind for kind in known if kind not in shown]
    there = not absent or rng.random() < 0.5
    kind = rng.choice(sorted(shown) if there else absent)
    return ask(rng, "presence", words.presence[not there], words.presence_metric, a=f"a {kind}")


def _place(rng: Random, words: Convention, things: dict) -> Question:
    named = list(things.values())
    single = [(place, kind) for place, kind in things.items() if named.count(kind) == 1]
    if not single:
        return _what_at(rng, things)
    place, kind = rng.choice(single)
    return ask(rng, "place", words.place(*place), a=kind)


def _what_at(rng: Random, things: dict) -> Question:
    place, kind = rng.choice(list(things.items()))
    return ask(rng, "what_at", kind, a=viewer_place(*place))


def _paint_smear(rng: Random, cells: dict) -> Image.Image:
    picture = speckled(rng, SMEAR)
    draw = ImageDraw.Draw(picture)
    for place, cell in cells.items():
        size = {"platelet": rng.randint(7, 9), "red cell": rng.randint(18, 21)}.get(cell, rng.randint(22, 26))
        _paint_cell(rng, draw, cell, grid_box(rng, place, size))
    return picture


def _paint_cell(rng: Random, draw: ImageDraw.ImageDraw, cell: str, box: Box) -> None:
    left, top, right, bottom = box
    size, purple, pink = right - left, tinted(rng, PURPLE), tinted(rng, PINK)
    if cell == "red cell":  # a pink disc with a pale centre
        draw.ellipse(box, fill=pink)
        draw.ellipse((left + size / 3, top + size / 3, right - size / 3, bottom - size / 3), fill=(244, 200, 206))
    elif cell == "lymphocyte":  # one large round nucleus
        draw.ellipse(box, fill=(214, 200, 232))
        draw.ellipse((left + 3, top + 3, right - 3, bottom - 3), fill=purple)
    elif cell == "neutrophil":  # a nucleus in three lobes
        draw.ellipse(box, fill=(240, 214, 222))
        lobe = size * 0.36
        for x, y in ((0.1, 0.12), (0.54, 0.2), (0.3, 0.56)):
            corner = (left + x * size, top + y * size)
            draw.ellipse((*corner, corner[0] + lobe, corner[1] + lobe), fill=purple)
    elif cell == "platelet":
        draw.ellipse(box, fill=purple)
    else:  # a bacillus is a rod
        middle = (top + bottom) / 2
        draw.rounded_rectangle((left, middle - 4, right, middle + 4), 4, fill=tinted(rng, (60, 120, 110)))


def _paint_radiograph(rng: Random, findings: dict) -> Image.Image:
    picture = speckled(rng, FILM)
    draw = ImageDraw.Draw(picture)
    body, lung = rng.randint(120, 136), rng.randint(48, 60)
    draw.rounded_rectangle((3, 1, 93, 95), 18, fill=(body, body, body))
    for left in (6, 59):
        draw.rounded_rectangle((left, 3, left + 31, 93), 12, fill=(lung, lung, lung))
    for rib in range(12, 96, 12):
        draw.line((6, rib, 37, rib - 4), fill=(lung + 22,) * 3, width=1)
        draw.line((59, rib - 4, 90, rib), fill=(lung + 22,) * 3, width=1)
    spine = body + 40
    draw.rectangle((43, 0, 53, 96), fill=(spine, spine, spine))
    for (row, column), finding in findings.items():
        _paint_finding(rng, draw, finding, (8 if column == 0 else 61, row * 31 + 3))
    return picture


def _paint_finding(rng: Random, draw: ImageDraw.ImageDraw, finding: str, corner: tuple[int, int]) -> None:
    """A finding inside the 28 x 28 zone at ``corner``."""
    left, top = corner[0] + rng.randint(0, 4), corner[1] + rng.randint(0, 5)
    bright = rng.randint(205, 240)
    fill = (bright, bright, bright)
    if finding == "nodule":
        draw.ellipse((left + 5, top + 4, left + 18, top + 17), fill=fill)
    elif finding == "effusion":  # a fluid level: flat top, full width
        draw.rectangle((left, top + 12, left + 23, top + 21), fill=fill)
    elif finding == "clip":  # a surgical clip: two short strokes
        draw.line((left + 8, top + 3, left + 8, top + 18), fill=(250, 250, 250), width=3)
        draw.line((left + 15, top + 3, left + 15, top + 18), fill=(250, 250, 250), width=3)
    else:  # a fracture: a bright broken line
        draw.line((left, top + 4, left + 11, top + 16, left + 13, top + 6, left + 24, top + 18), fill=fill, width=3)
