"""Small copies of pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from demo import pictures as module
from demo.pictures import Pictures
from mllm.common.errors import UserError
from mllm.data.images import fit_image, open_image, picture_side

PROCESSORS = {
    "shortest edge": CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    "squashed": CLIPImageProcessor(size={"height": 24, "width": 24}, do_center_crop=False),
    "letterbox": CLIPImageProcessor(size={"max_height": 24, "max_width": 24}, do_center_crop=False),
}


def noise(width=400, height=300, kind="PNG"):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pixels(image, processor):
    return processor([fit_image(image, processor, where="x")], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_model_sees_in_the_copy_bit_for_bit_what_training_sees_in_the_picture(name, kind, tmp_path):
    processor = PROCESSORS[name]
    trained = open_image(noise(kind=kind), where="x", at_least=picture_side(processor))
    copy = Pictures(processor, tmp_path).open(noise(kind=kind), "x")
    assert torch.equal(pixels(copy, processor), pixels(trained, processor))


def test_a_picture_is_decoded_once_and_what_is_shown_of_it_never(tmp_path, monkeypatch):
    pictures, opened = Pictures(PROCESSORS["squashed"], tmp_path), []
    shown = pictures.show(noise(), "x")
    first = pictures.open(noise(), "x")
    monkeypatch.setattr(module, "for_model", lambda *args: opened.append(args))
    again = pictures.open(shown.rename(tmp_path / "moved.jpg"), "x")  # Gradio moves what it shows
    assert opened == []
    assert again.tobytes() == first.tobytes()


def test_the_whole_picture_is_shown_at_a_modest_size(tmp_path):
    with Image.open(Pictures(PROCESSORS["squashed"], tmp_path).show(noise(2000, 1000, "JPEG"), "x")) as shown:
        assert shown.size == (640, 320)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_image", None)
    with pytest.raises(UserError, match=r"big\.png is too large"):
        Pictures(PROCESSORS["squashed"], tmp_path, max_pixels=1000).show(noise(), "big.png")


@pytest.mark.parametrize("content", [b"", b"words", noise()[:90]], ids=["empty", "no picture", "torn"])
def test_what_is_no_picture_is_refused_by_name(content, tmp_path):
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        Pictures(PROCESSORS["squashed"], tmp_path).show(content, "a.png")


def test_the_oldest_copies_go_when_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 8)
    pictures = Pictures(PROCESSORS["squashed"], tmp_path)
    for side in range(30, 36):
        pictures.show(noise(side, side), "x")
    assert len(list(tmp_path.iterdir())) <= 8
