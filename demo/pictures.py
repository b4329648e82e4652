"""Pictures of conversations: each is decoded once. From then on the page and the model have a small copy each.

The model's copy is what its image processor makes of the picture, up to the scaling of colours, without loss: the model
sees in it, bit for bit, what it would see in the original. The page's is the whole picture at a size for the eye. It
stands in the conversation from then on, and is known again by its content.
"""

import hashlib
import io
import os
import threading
from pathlib import Path

from PIL import Image
from transformers import BaseImageProcessor

from mllm.common.errors import UserError
from mllm.data.images import FORMATS, ImageError, fit_image, open_image, picture_side

MAX_PIXELS = 40_000_000  # decoding one of them takes 0.2 GB for a moment
MAX_FILES = 8000  # four a picture, of 0.1 MB
JPEG = b"\xff\xd8"
SHOWN = 640  # pixels of the long side of what the page shows


class Pictures:
    """Small copies in a folder, by the content of the picture."""

    def __init__(self, image_processor: BaseImageProcessor, folder: Path, *, max_pixels: int = MAX_PIXELS) -> None:
        self._processor, self._folder, self._max_pixels = image_processor, folder, max_pixels
        self._one_at_a_time = threading.Lock()  # large pictures of several people would need their memory together

    def show(self, picture: Path | bytes, name: str) -> Path:
        """The file that the page is to show.

        Raises `UserError`, which calls the picture by `name`, if it is damaged, none, or too large.
        """
        return self._copies(picture, name)[0]

    def open(self, picture: Path | bytes, name: str) -> Image.Image:
        """The model's copy, as an RGB picture. Raises `UserError` as `show` does."""
        return open_image(self._copies(picture, name)[1], where=name)

    def _copies(self, picture: Path | bytes, name: str) -> tuple[Path, Path]:
        try:
            content = picture if isinstance(picture, bytes) else picture.read_bytes()
            shown, seen = self._paths(content)
            with self._one_at_a_time:
                if not (shown.exists() and seen.exists()):
                    self._check_size(content, name)
                    self._write(content, shown, seen, name)
            return shown, seen
        except (ImageError, OSError) as error:
            raise UserError(
                f"The picture {name} cannot be read: it is damaged, not a picture, or too large. Attach another one."
            ) from error

    def _paths(self, content: bytes) -> tuple[Path, Path]:
        digest = hashlib.sha256(content).hexdigest()[:32]
        return self._folder / f"{digest}.jpg", self._folder / f"{digest}.png"

    def _check_size(self, content: bytes, name: str) -> None:
        """Tells the size from the file's head. Raises UserError for too many pixels, OSError for no picture."""
        pixels = None
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                pixels = image.width * image.height
        except Image.DecompressionBombError:
            pass
        except Exception as error:  # decoders raise anything
            raise OSError(f"{name} is not a picture") from error
        if pixels is None or pixels > self._max_pixels:
            raise UserError(
                f"The picture {name} is too large: at most {self._max_pixels // 1_000_000} million pixels are taken. "
                "Attach a smaller one."
            )

    def _write(self, content: bytes, shown: Path, seen: Path, name: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self._folder.iterdir(), key=lambda file: file.stat().st_mtime)
        for oldest in files[: max(0, len(files) - MAX_FILES + 4)]:
            oldest.unlink(missing_ok=True)
        picture = open_image(content, where=name, at_least=picture_side(self._processor))
        for_model(picture, self._processor, name).save(seen, "PNG")
        if content.startswith(JPEG):  # it may have been decoded smaller than the eye wants
            picture = open_image(content, where=name, at_least=SHOWN)
        picture.thumbnail((SHOWN, SHOWN))
        picture.save(shown, "JPEG", quality=92)
        for path, again in zip((shown, seen), self._paths(shown.read_bytes()), strict=True):
            if not again.exists():
                os.link(path, again)


def for_model(image: Image.Image, processor: BaseImageProcessor, name: str) -> Image.Image:
    """The picture as the processor scales and cuts it; processing it again changes nothing more."""
    fitted = fit_image(image, processor, where=name)
    pixels = processor([fitted], do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    return Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())
