import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from mllm.data import ImageError, images, open_image
from mllm.data.images import THIN, crop_thin, fit_image


def reopened(image, tmp_path, suffix="png", **options):
    image.save(tmp_path / f"image.{suffix}", **options)
    return open_image(tmp_path / f"image.{suffix}", where="row 1")


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 16448, 32896, 65535]], dtype=np.uint16)
    assert np.asarray(reopened(Image.fromarray(deep), tmp_path))[0, :, 0].tolist() == [0, 64, 128, 255]


def test_the_12_bits_of_a_radiograph_fill_the_8_bits(tmp_path):
    deep = np.linspace(0, 4095, 10_000).astype(np.uint16).reshape(100, 100)
    deep[0, 0] = 65535  # a burnt-in mark
    grey = np.asarray(reopened(Image.fromarray(deep), tmp_path))[..., 0]
    assert grey[1:].min() <= 3
    assert int(grey[50, 50]) == pytest.approx(128, abs=3)
    assert np.percentile(grey, 99) >= 250


def test_a_window_that_a_tiff_names_is_taken(tmp_path):
    deep = np.array([[0, 1000, 2000, 3000, 60000]], dtype=np.uint16)
    named = {280: 1000, 281: 3000}
    grey = np.asarray(reopened(Image.fromarray(deep), tmp_path, "tiff", tiffinfo=named))[0, :, 0]
    assert grey.tolist() == [0, 0, 128, 255, 255]


def test_the_noise_of_a_picture_of_one_grey_is_not_made_larger(tmp_path):
    deep = np.random.default_rng(0).integers(30_000, 30_004, (50, 50)).astype(np.uint16)
    assert np.ptp(np.asarray(reopened(Image.fromarray(deep), tmp_path))[..., 0]) <= 4


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


@pytest.fixture(scope="module")
def photograph():
    """Smooth colours with edges, 1600 x 1200."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    return coarse.resize((1600, 1200), Image.Resampling.BICUBIC)


def processor_of(side, **size):
    return CLIPImageProcessor(size=size, crop_size={"height": side, "width": side})


def pixels(image, processor):
    """As the encoder makes them, in 0 to 255."""
    fitted = fit_image(image, processor, where="row 1")
    values = processor([fitted], return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
    return 255 * (values * std + mean)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_decoded_no_larger_than_needed(orientation, photograph, tmp_path):
    exif = photograph.getexif()
    exif[0x0112] = orientation
    photograph.save(tmp_path / "photo.jpg", quality=90, exif=exif)
    sizes = [sorted(open_image(tmp_path / "photo.jpg", where="row 1", at_least=side).size) for side in (336, 800, 100)]
    assert sizes == [[600, 800], [1200, 1600], [150, 200]]


def test_a_jpeg_decoded_smaller_gives_nearly_the_same_pixels(photograph, tmp_path):
    photograph.save(tmp_path / "photo.jpg", quality=90)
    processor = processor_of(336, shortest_edge=336)
    whole, small = (
        pixels(open_image(tmp_path / "photo.jpg", where="row 1", at_least=side), processor) for side in (None, 336)
    )
    assert not torch.equal(whole, small)
    assert (whole - small).abs().mean() < 1.0  # of 255; 0.67 on a mosaic of photographs


@pytest.mark.parametrize("size", [(1, 2000), (9000, 1), (2, 60)])
def test_a_thin_picture_is_cropped_before_it_is_scaled(size):
    image = Image.new("RGB", size, "red")
    fitted = fit_image(image, processor_of(336, shortest_edge=336), where="row 1")
    assert max(fitted.size) <= 4 * min(fitted.size) + 9
    assert pixels(image, processor_of(336, shortest_edge=336)).shape == (3, 336, 336)


@pytest.mark.parametrize("size", [(3, 60), (61, 3), (4, 100)])
def test_what_the_middle_of_a_thin_picture_shows_does_not_change(size):
    """Where the scale is whole; else rounding of the scaled length may move it by half a pixel."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image, processor = Image.fromarray(noise), processor_of(24, shortest_edge=24)
    assert crop_thin(image).size != image.size
    torch.testing.assert_close(
        processor([crop_thin(image)], return_tensors="pt")["pixel_values"],
        processor([image], return_tensors="pt")["pixel_values"],
        rtol=0,
        atol=0.05,
    )


def test_other_pictures_are_left_as_they_are():
    for size in [(100, 100 * THIN), (40, 30)]:
        image = Image.new("RGB", size)
        assert fit_image(image, processor_of(24, shortest_edge=24), where="row 1") is image
        assert fit_image(image, processor_of(24, height=24, width=24), where="row 1") is image


def test_padding_has_the_mean_colour_of_the_tower():
    processor = processor_of(24, max_height=24, max_width=24)
    image = Image.new("RGB", (40, 20), "red")
    padded = processor([fit_image(image, processor, where="row 1")], return_tensors="pt")["pixel_values"][0]
    assert padded.shape == (3, 24, 24)
    assert padded[:, :6].abs().max() < 0.5 / 255 / min(processor.image_std)  # zero but for rounding to 8 bits
    assert padded[:, 18:].abs().max() < 0.5 / 255 / min(processor.image_std)
    assert pixels(image, processor)[:, 12, 12].tolist() == pytest.approx([255, 0, 0], abs=1)


def test_a_picture_of_whose_short_side_nothing_is_left_is_refused_by_row():
    processor = processor_of(24, max_height=24, max_width=24)
    with pytest.raises(ImageError, match="row 1: a picture of 200 x 1 pixels is too thin: scaled to 24 x 24"):
        fit_image(Image.new("RGB", (200, 1)), processor, where="row 1")
    assert fit_image(Image.new("RGB", (30, 1)), processor, where="row 1").size == (24, 24)
