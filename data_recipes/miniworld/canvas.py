"""Pixels: the picture size, the font, and the primitives that all three domains draw with."""

from random import Random

from PIL import Image, ImageDraw, ImageFont

SIZE = 96
FONT = ImageFont.load_default_imagefont()  # Pillow's own 6 x 11 bitmap font: always there, the same everywhere
CHARACTER, LINE = 6, 12  # pixels

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]


def tinted(rng: Random, colour: Colour, spread: int = 12) -> Colour:
    """The colour with each channel moved a little."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue


def grid_box(rng: Random, cell: tuple[int, int], size: int) -> Box:
    """A square of ``size`` pixels somewhere inside a (row, column) cell of the 3 x 3 grid."""
    row, column = cell
    left = column * SIZE // 3 + rng.randint(1, SIZE // 3 - size - 1)
    top = row * SIZE // 3 + rng.randint(1, SIZE // 3 - size - 1)
    return left, top, left + size, top + size


def text_line(draw: ImageDraw.ImageDraw, line: int, column: int, text: str, ink: Colour) -> None:
    """Writes on the character grid: 8 lines of 16 characters."""
    draw.text((column * CHARACTER, line * LINE), text, font=FONT, fill=ink)


def speckled(rng: Random, noise: Image.Image, mode: str = "RGB") -> Image.Image:
    """A picture-sized cut of a larger noise tile at a random place: texture at the price of one crop."""
    left, top = rng.randrange(noise.width - SIZE), rng.randrange(noise.height - SIZE)
    return noise.crop((left, top, left + SIZE, top + SIZE)).convert(mode)


def noise_tile(seed: int, colour: Colour, spread: int, side: int = 256) -> Image.Image:
    """A tile of ``colour`` with Gaussian noise of ``spread`` levels, made once at import."""
    rng = Random(seed)
    tile = Image.new("RGB", (side, side))
    tile.putdata([tinted_by(colour, round(rng.gauss(0, spread))) for _ in range(side * side)])
    return tile


def tinted_by(colour: Colour, shift: int) -> Colour:
    """All channels moved by the same number of levels."""
    red, green, blue = (min(255, max(0, channel + shift)) for channel in colour)
    return red, green, blue
