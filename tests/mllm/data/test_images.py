import numpy as np
import pytest
from PIL import Image

from mllm.data import ImageError, images, open_image


def reopened(image, tmp_path, suffix="png", **options):
    image.save(tmp_path / f"image.{suffix}", **options)
    return open_image(tmp_path / f"image.{suffix}", where="row 1")


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 16448, 32896, 65535]], dtype=np.uint16)
    assert np.asarray(reopened(Image.fromarray(deep), tmp_path))[0, :, 0].tolist() == [0, 64, 128, 255]


def test_float_grey_is_scaled_from_its_least_to_its_greatest(tmp_path):
    floats = np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)
    assert np.asarray(reopened(Image.fromarray(floats), tmp_path, "tiff"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_come_out_white(mode, tmp_path):
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert(mode)
    assert reopened(clear, tmp_path).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_entry_comes_out_white(tmp_path):
    palette = Image.new("RGB", (2, 2), "red").quantize(4)
    assert reopened(palette, tmp_path, transparency=palette.getpixel((0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["P", "CMYK", "1", "L"])
def test_other_modes_become_rgb_of_the_same_colour(mode, tmp_path):
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    opened = reopened(image, tmp_path, "tiff")
    assert (opened.mode, opened.getpixel((1, 1))) == ("RGB", (255, 255, 255))


def test_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    assert reopened(image, tmp_path, "jpg", exif=exif).size == (4, 8)


@pytest.mark.parametrize("name", ["truncated.png", "text.png", "empty.png"])
def test_undecodable_file_is_named_with_its_row(name, root):
    (root / "empty.png").touch()
    with pytest.raises(ImageError, match=f"row 1: image .*{name} cannot be decoded"):
        open_image(root / name, where="row 1")


def test_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    with pytest.raises(ImageError, match=r"row 1: image .*bomb.png has 200 x 200 pixels"):
        open_image(tmp_path / "bomb.png", where="row 1")


def test_format_that_starts_a_program_is_not_opened(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "page.eps")
    with pytest.raises(ImageError, match="cannot be decoded"):
        open_image(tmp_path / "page.eps", where="row 1")


def test_missing_file_is_named_with_its_row(tmp_path):
    with pytest.raises(ImageError, match=r"row 1: no image file .*none.png"):
        open_image(tmp_path / "none.png", where="row 1")
