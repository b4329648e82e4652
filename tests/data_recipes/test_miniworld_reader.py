"""The reader of pictures, on pictures whose facts are known."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from data_recipes.miniworld import draw_scene, scenes
from data_recipes.miniworld_reader import Score, read_caption, read_scene, score_picture

COUNT = 400


@pytest.fixture(scope="module")
def known():
    return [(scene.paint(rng), scene.caption) for scene, rng in scenes("general", "test", COUNT)]


def test_at_least_99_of_100_objects_of_true_pictures_are_read_right(known):
    total = sum((score_picture(picture, caption) for picture, caption in known), Score(0, 0, 0, 0, 0))
    assert total.objects > 2 * COUNT
    assert total.both / total.objects >= 0.99
    assert total.extra == 0


def test_most_survive_noise_and_a_blur_such_as_a_tokenizer_leaves(known):
    rng = np.random.default_rng(0)

    def worn(picture):
        small = picture.resize((72, 72), Image.Resampling.BILINEAR).resize((96, 96), Image.Resampling.BILINEAR)
        noisy = np.asarray(small) + rng.normal(0, 8, (96, 96, 3))
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    total = sum((score_picture(worn(picture), caption) for picture, caption in known[:100]), Score(0, 0, 0, 0, 0))
    assert total.both / total.objects >= 0.95


def test_a_picture_of_another_text_scores_low(known):
    pairs = pairwise(known)
    total = sum((score_picture(one[0], other[1]) for one, other in pairs), Score(0, 0, 0, 0, 0))
    assert total.share < 0.1


def test_a_blank_picture_shows_nothing_and_scores_nothing():
    blank = Image.new("RGB", (96, 96), (214, 234, 248))
    assert read_scene(blank) == {}
    score = score_picture(blank, "a scene: red ball at the top")
    assert (score.objects, score.both, score.extra) == (1, 0, 0)


def test_an_object_nobody_named_lowers_the_share():
    scene, rng = draw_scene("general", "test", 0)
    first = scene.caption.split(",")[0]
    score = score_picture(scene.paint(rng), first)
    assert score.both == score.objects == 1
    assert score.extra == len(read_caption(scene.caption)) - 1
    assert score.share == 1 / (1 + score.extra)
