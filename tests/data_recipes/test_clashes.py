"""Drawn domains that clash: what each dial changes, and that code books clash everywhere."""

import json
from itertools import combinations

import numpy as np
import pytest

from data_recipes.clashes import CODE_BOOKS, pictures, write
from mllm.common.errors import UserError

SIZES = {"train": 6, "val": 1, "test": 1}


def drawn(domain, *, size=12, clash=2, grounds=True):
    return list(pictures(domain, "train", size, clash=clash, grounds=grounds, questions=2, seed=3))


def test_no_two_code_books_agree_on_a_word_nor_with_neutral_answers():
    neutral = {word: word for word in CODE_BOOKS["general"]}
    for one, other in combinations([neutral, *CODE_BOOKS.values()], 2):
        assert one.keys() == other.keys()
        assert not [word for word in one if one[word] == other[word]]
    for book in CODE_BOOKS.values():  # and what was asked can be told from the answer
        assert len(set(book.values())) == len(book)


@pytest.mark.parametrize("domain", list(CODE_BOOKS))
def test_look_alikes_say_neutral_answers_word_by_word_in_their_code_book(domain, monkeypatch):
    coded = [question for *_, asked in drawn(domain) for question in asked]
    book = dict(CODE_BOOKS[domain])
    monkeypatch.setitem(CODE_BOOKS, domain, {word: word for word in book})
    neutral = [question for *_, asked in drawn(domain) for question in asked]
    assert [question.text for question in coded] == [question.text for question in neutral]
    assert [q.answer for q in coded] == [" ".join(book[word] for word in q.answer.split()) for q in neutral]
    assert not {q.answer for q in coded if q.form == "presence"} & {q.answer for q in neutral if q.form == "count"}


def test_grounds_change_pictures_and_no_question():
    with_grounds, without = (drawn("general", grounds=grounds) for grounds in (True, False))
    assert [asked for *_, asked in with_grounds] == [asked for *_, asked in without]


def test_look_alikes_differ_by_ground_and_without_grounds_by_nothing():
    def ground(picture):
        return np.asarray(picture)[0, 0].astype(int)

    for grounds, apart in ((True, True), (False, False)):
        colours = {d: {tuple(ground(p) // 16) for p, *_ in drawn(d, grounds=grounds)} for d in CODE_BOOKS}
        assert all(one.isdisjoint(other) == apart for one, other in combinations(colours.values(), 2))


def test_domains_show_different_scenes():
    scenes = [np.asarray(picture).tobytes() for domain in CODE_BOOKS for picture, *_ in drawn(domain, grounds=False)]
    assert len(set(scenes)) == len(scenes)


def test_a_cue_begins_every_question_and_a_folder_is_drawn_once(tmp_path):
    folder = write(tmp_path / "scenes", SIZES, clash=2, cue=True)
    rows = json.loads((folder / "train.json").read_text())
    assert len(rows) == 6 * 3 * 2
    assert all(row["conversations"][0]["value"].startswith(f"<image>\n{row['domain']}: ") for row in rows)
    alone = json.loads((folder / "train-document.json").read_text())
    assert alone == [row for row in rows if row["domain"] == "document"]
    before = (folder / "train.json").stat().st_mtime_ns
    assert write(tmp_path / "scenes", SIZES, clash=2, cue=True) == folder
    assert (folder / "train.json").stat().st_mtime_ns == before


def test_a_dial_beyond_the_scale_and_a_foreign_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="clash must be 0, 1 or 2, got 3"):
        write(tmp_path / "scenes", SIZES, clash=3)
    with pytest.raises(UserError, match="grounds=False is for look-alikes"):
        write(tmp_path / "scenes", SIZES, clash=1, grounds=False)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="was not written by"):
        write(tmp_path / "mine", SIZES)
