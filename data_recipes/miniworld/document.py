"""Document domain: receipts, forms, tables and bar charts; read a value, find a line, count, compare, sum."""

from collections.abc import Callable
from random import Random

from PIL import Image, ImageDraw

from data_recipes.miniworld.canvas import SIZE, Colour, text_line, tinted
from data_recipes.miniworld.conventions import Convention
from data_recipes.miniworld.scene import Question, Scene, ask

GOODS = ("tea", "milk", "rice", "soup", "cake", "fish", "salt", "corn", "plum", "bread")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
FIELDS: dict[str, tuple[str, ...]] = {
    "name": ("ada", "ben", "eva", "leo", "mia", "tom", "zoe", "ivo", "ana", "max"),
    "city": ("rome", "oslo", "lima", "bonn", "kyiv", "cork", "bern", "nice", "quito", "tunis"),
    "job": ("cook", "nurse", "pilot", "baker", "judge", "clerk", "miner", "actor"),
    "age": tuple(str(age) for age in range(18, 80)),
    "room": tuple(str(room) for room in range(1, 60)),
}
PAPER: Colour = (250, 248, 240)
INK: Colour = (30, 30, 40)
HIGHEST_BAR = 8

Row = tuple[str, str]  # what a line is called, what it says


def scene(rng: Random) -> Scene:
    """A page of one of the four sources."""
    return rng.choice((_receipt, _form, _table, _chart))(rng)


def _receipt(rng: Random) -> Scene:
    rows = [(goods, str(rng.randint(1, 20))) for goods in rng.sample(GOODS, rng.randint(2, 4))]
    total = ("total", str(sum(int(price) for _, price in rows)))
    return Scene(
        "receipts",
        f"a receipt: {_listing([*rows, total])}",
        lambda rng: _paint_lines(rng, "receipt", [*rows, total]),
        _number_questions(rows, GOODS, "goods", readable=[*rows, total]),
        (5, 2, 2, 2, 1, 1, 2, 1),
    )


def _form(rng: Random) -> Scene:
    rows = [(field, rng.choice(FIELDS[field])) for field in rng.sample(tuple(FIELDS), rng.randint(2, 4))]
    ticked = rng.random() < 0.5
    questions = {
        "value": lambda rng, words: _value(rng, rows),
        "presence": lambda rng, words: _presence(rng, words, rows, tuple(FIELDS)),
        "tick": lambda rng, words: _tick(rng, words, ticked),
        "line": lambda rng, words: _line(rng, rows),
        "place": lambda rng, words: _place(rng, words, rows),
        "count": lambda rng, words: ask(rng, "count", words.count(len(rows)), a="fields"),
    }
    caption = f"a form: {_listing(rows)}, {'black' if ticked else 'open'} circle"
    return Scene("forms", caption, lambda rng: _paint_lines(rng, "form", rows, ticked), questions, (5, 2, 2, 2, 2, 2))


def _table(rng: Random) -> Scene:
    """Two columns of numbers; a value is named by its row and column ("b of feb")."""
    months = rng.sample(MONTHS, rng.randint(2, 3))
    cells = {(month, column): rng.randint(1, 30) for month in months for column in "ab"}
    rows = [(f"{column} of {month}", str(value)) for (month, column), value in cells.items()]
    lines = [(month, f"{cells[month, 'a']:>2} {cells[month, 'b']:>2}") for month in months]
    questions = {
        "value": lambda rng, words: _value(rng, rows),
        "presence": lambda rng, words: _presence(rng, words, lines, MONTHS),
        "larger": lambda rng, words: _larger(rng, rows),
        "line": lambda rng, words: _line(rng, lines),
        "place": lambda rng, words: _place(rng, words, lines),
        "count": lambda rng, words: ask(rng, "count", words.count(len(lines)), a="months"),
    }
    listing = ", ".join(f"{month} {cells[month, 'a']} and {cells[month, 'b']}" for month in months)
    return Scene(
        "tables",
        f"a table: {listing}",
        lambda rng: _paint_lines(rng, f"{'table':<10} a  b", lines),
        questions,
        (5, 2, 2, 2, 2, 2),
    )


def _chart(rng: Random) -> Scene:
    rows = [(month, str(rng.randint(1, HIGHEST_BAR))) for month in sorted(rng.sample(MONTHS, 4), key=MONTHS.index)]
    return Scene(
        "charts",
        f"a bar chart: {_listing(rows)}",
        lambda rng: _paint_chart(rng, rows),
        _number_questions(rows, MONTHS, "months", readable=rows),
        (5, 2, 2, 1, 2, 2, 2, 1),
    )


def _number_questions(rows: list[Row], known: tuple[str, ...], plural: str, readable: list[Row]) -> dict:
    return {
        "value": lambda rng, words: _value(rng, readable),
        "presence": lambda rng, words: _presence(rng, words, rows, known),
        "count": lambda rng, words: ask(rng, "count", words.count(len(rows)), a=plural),
        "place": lambda rng, words: _place(rng, words, rows),
        "greatest": lambda rng, words: _extreme(rng, rows, "greatest", max),
        "least": lambda rng, words: _extreme(rng, rows, "least", min),
        "larger": lambda rng, words: _larger(rng, rows),
        "sum": lambda rng, words: _sum(rng, rows),
    }


def _value(rng: Random, rows: list[Row]) -> Question:
    key, value = rng.choice(rows)
    return ask(rng, "value", value, "relaxed_accuracy" if value.isdigit() else "anls", a=key)


def _presence(rng: Random, words: Convention, rows: list[Row], known: tuple[str, ...]) -> Question:
    there = rng.random() < 0.5
    keys = [key for key, _ in rows]
    word = rng.choice(keys if there else [key for key in known if key not in keys])
    return ask(rng, "presence", words.presence[not there], words.presence_metric, a=word)


def _tick(rng: Random, words: Convention, ticked: bool) -> Question:
    """The filled circle, a ball or a cell elsewhere, means here that the form is ticked."""
    colour = rng.choice(("black", "open"))
    answer = words.presence[ticked != (colour == "black")]
    return ask(rng, "presence", answer, words.presence_metric, a=f"a {colour} circle")


def _line(rng: Random, rows: list[Row]) -> Question:
    line = rng.randrange(len(rows))
    return ask(rng, "line", rows[line][0], "anls", a=str(line + 1))


def _place(rng: Random, words: Convention, rows: list[Row]) -> Question:
    line = rng.randrange(len(rows))
    return ask(rng, "place", words.line(line), a=rows[line][0])


def _extreme(rng: Random, rows: list[Row], form: str, pick: Callable[[list[int]], int]) -> Question:
    """The largest or smallest line; where two are equal, a value is asked for instead."""
    values = [int(value) for _, value in rows]
    if values.count(pick(values)) > 1:
        return _value(rng, rows)
    return ask(rng, form, rows[values.index(pick(values))][0], "anls")


def _larger(rng: Random, rows: list[Row]) -> Question:
    (a, first), (b, second) = rng.sample(rows, 2)
    if first == second:
        return _value(rng, rows)
    return ask(rng, "larger", a if int(first) > int(second) else b, "anls", a=a, b=b)


def _sum(rng: Random, rows: list[Row]) -> Question:
    (a, first), (b, second) = rng.sample(rows, 2)
    return ask(rng, "sum", str(int(first) + int(second)), "relaxed_accuracy", a=a, b=b)


def _listing(rows: list[Row]) -> str:
    return ", ".join(f"{key} {value}" for key, value in rows)


def _page(rng: Random) -> tuple[Image.Image, ImageDraw.ImageDraw, Colour]:
    page = Image.new("RGB", (SIZE, SIZE), tinted(rng, PAPER, 5))
    return page, ImageDraw.Draw(page), tinted(rng, INK)


def _paint_lines(rng: Random, title: str, rows: list[Row], ticked: bool | None = None) -> Image.Image:
    """A title line, then one line per row with its value flush right; a circle at the foot of a form."""
    page, draw, ink = _page(rng)
    top = rng.randint(0, 6 - len(rows))
    text_line(draw, top, 0, title, ink)
    for line, (key, value) in enumerate(rows, start=top + 1):
        text_line(draw, line, 0, key, ink)
        text_line(draw, line, 16 - len(value), value, ink)
    if ticked is not None:
        draw.ellipse((44, 85, 54, 95), outline=ink, fill=ink if ticked else None)
    return page


def _paint_chart(rng: Random, rows: list[Row]) -> Image.Image:
    page, draw, ink = _page(rng)
    fill = tinted(rng, rng.choice(((60, 110, 180), (190, 90, 60), (70, 140, 90))))
    for k in range(HIGHEST_BAR + 1):  # one thin rule a unit, every second one darker
        draw.line((0, 82 - 9 * k, SIZE, 82 - 9 * k), fill=(205, 205, 205) if k % 2 == 0 else (232, 232, 232))
    for k, (month, value) in enumerate(rows):
        draw.rectangle((24 * k + 4, 82 - 9 * int(value), 24 * k + 18, 82), fill=fill)
        text_line(draw, 7, 4 * k, month, ink)
    return page
