"""Picture files to 8-bit RGB, with every way a file can be bad turned into one error that names row and file."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers import BaseImageProcessor

from mllm.common.errors import RowError

Image.init()
# Decoders that only decode: EPS, for one, starts an outside program. Some builds of Pillow lack some of them.
FORMATS = [
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
]
MAX_PIXELS = 90_000_000  # about 9500 x 9500; a larger picture is taken for a decompression bomb
THIN = 8  # long side over short, above which a picture's ends are left out before its short side is scaled
OUTLIERS = 0.001  # share of a 16-bit picture's pixels at either end that its window of greys leaves out
MIN_MAX_SAMPLE = (280, 281)  # TIFF's tags of the least and greatest grey


class ImageError(RowError):
    """A picture that is missing, unreadable, too large or too thin."""

    reason = "picture"


class MissingImageError(ImageError):
    """A picture's file that is not there."""

    reason = "missing picture"


def open_image(path: str | Path | bytes, *, where: str, at_least: int | None = None) -> Image.Image:
    """Reads a picture as upright 8-bit RGB.

    Transparent parts come out white; deep greys are scaled to 8 bits, see `to_rgb`.

    Args:
        path: the file, or its content, which tells the format and not its suffix.
        where: the row that asks for it, for the error message.
        at_least: pixels that the short side is needed to have, see `picture_side`. A JPEG is then decoded at a half, a
            quarter or an eighth of its size, as long as so many are left; nothing is made larger.

    Raises:
        ImageError: the file is missing, truncated, not a picture, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(io.BytesIO(path) if isinstance(path, bytes) else path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"{where}: image {path} has {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} "
                    "allowed. Make it smaller, or leave the row out."
                )
            if at_least is not None:
                image.draft(None, (at_least, at_least))  # other formats have no smaller size to be decoded at
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise missing_image(path, where) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(
            f"{where}: image {path} cannot be decoded ({type(error).__name__}: {error}). "
            "It is truncated or not a picture: replace the file, or leave the row out."
        ) from error


def missing_image(path: str | Path, where: str) -> MissingImageError:
    """The error for a file that does not exist."""
    return MissingImageError(
        f"{where}: no image file {path!s:.300}. Check the record's `image` and the source's `image_root`."
    )


def picture_side(image_processor: BaseImageProcessor) -> int:
    """Pixels a side that an image processor scales pictures to: `at_least` for `open_image`."""
    return max(value for value in dict(image_processor.size).values() if value)


def fit_image(image: Image.Image, image_processor: BaseImageProcessor, *, where: str) -> Image.Image:
    """Makes an RGB picture ready for a CLIP image processor, whose own way goes wrong at the edges.

    Where the short side is scaled and the middle cut out, the ends of a thin picture go first: 1 x 9000 pixels would
    become 336 x 3,024,000 on the way. Where the long side is scaled, the rest of the square gets the mean colour, as
    LLaVA has it, and not black; the processor then leaves the picture as it is.

    Raises:
        ImageError: less than half a pixel would be left of the short side.
    """
    size = dict(image_processor.size)
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return crop_thin(image)
    if size.get("max_height") and size.get("max_width"):
        return _letterbox(image, size["max_height"], size["max_width"], image_processor, where)
    return image


def crop_thin(image: Image.Image) -> Image.Image:
    """The middle of a picture more than `THIN` times as long as wide; any other as it is.

    Four squares in a row stay, and as many pixels as a filter reaches: cutting the middle square out of the scaled
    picture then gives what it gave before.
    """
    short, long = sorted(image.size)
    if long <= THIN * short:
        return image
    keep = 4 * short + 8
    keep += (long - keep) % 2  # the middle stays where it was
    begin = max(0, (long - keep) // 2)
    is_wide = image.width > image.height
    box = (begin, 0, long - begin, short) if is_wide else (0, begin, short, long - begin)
    return image.crop(box)


def _letterbox(
    image: Image.Image, height: int, width: int, image_processor: BaseImageProcessor, where: str
) -> Image.Image:
    """The picture scaled into height x width, in the middle of that much mean colour."""
    scale = min(height / image.height, width / image.width)
    if scale * min(image.size) < 0.5:
        raise ImageError(
            f"{where}: a picture of {image.width} x {image.height} pixels is too thin: scaled to {width} x {height}"
            " nothing would be left of its short side. Cut it, or leave the row out."
        )
    size = [max(1, int(side * scale)) for side in image.size]
    mean = tuple(round(255 * channel) for channel in image_processor.image_mean)
    square = Image.new("RGB", (width, height), mean)
    square.paste(image.resize(size, image_processor.resample), ((width - size[0]) // 2, (height - size[1]) // 2))
    return square


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB: alpha is laid over white, deep greys are scaled to 8 bits.

    The window of greys that becomes 0 to 255 is the one that a TIFF names, or else for 16 bits the one that holds all
    pixels but a thousandth at either end (a radiograph's 12 bits would else be black), and for other integers and
    floats, which may be anything, all.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey_to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _deep_grey_to_8_bits(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    told = [np.atleast_1d(tags[tag])[0] for tag in MIN_MAX_SAMPLE if tag in tags]
    grey = np.nan_to_num(np.asarray(image), posinf=0.0, neginf=0.0)
    if len(told) == 2 and told[0] < told[1]:
        low, high = float(told[0]), float(told[1])
    elif image.mode.startswith("I") and grey.min() >= 0 and grey.max() <= 65535:
        below = np.bincount(grey.ravel(), minlength=65536).cumsum()
        low, high = (int(np.searchsorted(below, share * grey.size)) for share in (OUTLIERS, 1 - OUTLIERS))
        high = max(high, low + 255)  # of a picture of one grey the noise is not made larger
    else:
        low, high = float(grey.min()), float(grey.max())
    scaled = (grey.astype(np.float64) - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
