"""Picture files to 8-bit RGB, with every way a file can be bad turned into one error that names row and file."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mllm.errors import RowError

Image.init()
# Decoders that only decode: EPS, for one, starts an outside program. Some builds of Pillow lack some of them.
FORMATS = [
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
]
MAX_PIXELS = 90_000_000  # about 9500 x 9500; a larger picture is taken for a decompression bomb


class ImageError(RowError):
    """A picture that is missing, unreadable, too large or too thin."""

    reason = "picture"


class MissingImageError(ImageError):
    """A picture's file that is not there."""

    reason = "missing picture"


def open_image(path: str | Path, *, where: str) -> Image.Image:
    """Reads a picture as upright 8-bit RGB.

    Transparent parts come out white; 16-bit and floating-point greys are scaled to 8 bits, not clipped.

    Args:
        path: the file; its content, not its suffix, tells the format.
        where: the row that asks for it, for the error message.

    Raises:
        ImageError: the file is missing, truncated, not a picture, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"{where}: image {path} has {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} "
                    "allowed. Make it smaller, or leave the row out."
                )
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB: alpha is laid over white, deep greys are scaled to 8 bits."""
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
    """Scales 16-bit greys by their full range; other integers and floats, which have none, by their extremes."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = float(grey.min()), float(grey.max())
    if image.mode.startswith("I") and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (grey - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(scaled.round().astype(np.uint8))
