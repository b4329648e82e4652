"""Miniworld: deterministic, disjoint splits, truthful answers, and conventions that really clash."""

import json
import time
from random import Random

import numpy as np
import pytest
from PIL import Image

from data_recipes.miniworld import CONVENTIONS, DOMAINS, NEUTRAL, draw_scene, scenes, split_of
from data_recipes.miniworld.__main__ import write
from data_recipes.miniworld.canvas import SIZE
from data_recipes.miniworld.conventions import patient_place, viewer_place
from data_recipes.miniworld.general import COLOURS, SHAPES
from mllm.common.errors import UserError
from mllm.data.sources import Source
from mllm.evaluation.metrics import score

SIZES = {"train": 6, "val": 2, "test": 3}


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_scene_is_a_pure_function_of_its_number(domain):
    (first, one), (again, two) = draw_scene(domain, "train", 7, seed=3), draw_scene(domain, "train", 7, seed=3)
    assert first.caption == again.caption
    assert np.array_equal(np.asarray(first.paint(one)), np.asarray(again.paint(two)))
    assert first.ask(one, NEUTRAL) == again.ask(two, NEUTRAL)


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_caption(domain):
    captions = {split: {scene.caption for scene, _ in scenes(domain, split, 150)} for split in ("train", "val", "test")}
    assert all(split_of(caption) == split for split, members in captions.items() for caption in members)
    assert not captions["train"] & captions["test"]
    assert not captions["val"] & captions["test"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_samples_hardly_repeat(domain):
    """benchmarks/miniworld.py draws on until 100,000 differ."""
    drawn = (draw_scene(domain, "train", index) for index in range(5_000))
    assert len({(scene.caption, scene.ask(rng, NEUTRAL)) for scene, rng in drawn}) > 4_500


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_form_of_question_has_its_own_answer_right_under_its_metric(domain):
    forms = set()
    for index in range(300):
        scene, rng = draw_scene(domain, "train", index)
        for question in scene.ask_several(rng, CONVENTIONS[domain], 4):
            forms.add((scene.source, question.form))
            assert score(question.metric, question.answer, [question.answer]) == 1.0
    assert len(forms) >= 6


def test_answers_to_counts_and_places_follow_from_the_caption():
    for index in range(200):
        scene, rng = draw_scene("general", "train", index)
        things = scene.caption.removeprefix("a scene: ").split(", ")
        counted = scene.questions["count"](rng, NEUTRAL)
        words = counted.text.rstrip("?.")
        kind = next((w for w in (*COLOURS, *SHAPES) if f" {w}" in words), "")
        assert counted.answer == str(sum(f"{kind} " in thing or not kind for thing in things)), (scene.caption, counted)
        seen = scene.questions["what_at"](rng, NEUTRAL)
        assert any(
            thing.startswith(seen.answer) and seen.text.rstrip("?.").endswith(thing.split("at ")[1]) for thing in things
        )


def test_the_same_form_of_question_wants_different_answers_in_different_domains():
    answers = {domain: (words.presence, words.count(3), words.place(0, 0)) for domain, words in CONVENTIONS.items()}
    presences, counts, places = zip(*answers.values(), strict=True)
    assert len(set(presences)) == 3
    assert len(set(counts)) == 3
    assert len(set(places)) == 2  # pages have lines instead
    for mine in counts:
        assert sum(score("exact_match", mine, [other]) for other in counts) == 1.0  # apart under the metric too


def test_the_patients_right_is_the_viewers_left():
    assert viewer_place(0, 0) == "top left"
    assert patient_place(0, 0) == "upper right"
    assert patient_place(2, 1) == "lower"
    assert patient_place(1, 1) == "center"


def test_pictures_change_with_every_painting_and_have_one_size():
    scene, _ = draw_scene("biomedical", "train", 1)
    one, two = scene.paint(Random(1)), scene.paint(Random(2))
    assert one.size == two.size == (SIZE, SIZE)
    assert not np.array_equal(np.asarray(one), np.asarray(two))


def test_drawing_is_fast():
    """Not a benchmark: a tenth of the promised 2,000 samples a second, so that only a real fault fails it."""
    start = time.perf_counter()
    for index in range(200):
        scene, rng = draw_scene(DOMAINS[index % 3], "train", index)
        scene.paint(rng)
        scene.ask(rng, NEUTRAL)
    assert 200 / (time.perf_counter() - start) > 200


def test_what_is_written_reads_as_llava_json(tmp_path):
    out = write(tmp_path / "world", SIZES, questions=2, seed=1)
    for split, size in SIZES.items():
        rows = Source(out / f"{split}.json")
        assert {row.domain for row in rows} == set(DOMAINS)
        assert len({row.images for row in rows}) == 3 * size
    assert len(json.loads((out / "captions.json").read_text())) == 3 * SIZES["train"]
    assert Image.open(rows[0].images[0]).size == (SIZE, SIZE)


def test_writing_again_with_the_same_settings_changes_nothing(tmp_path):
    out = write(tmp_path / "world", SIZES)
    stamp = (out / "train.json").stat().st_mtime_ns
    assert (write(tmp_path / "world", SIZES) / "train.json").stat().st_mtime_ns == stamp


def test_a_foreign_folder_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not written by miniworld"):
        write(tmp_path / "mine", SIZES)
    assert (tmp_path / "mine" / "thesis.txt").exists()
