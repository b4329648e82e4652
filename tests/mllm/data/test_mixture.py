import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import data_recipes
from mllm.common.errors import UserError
from mllm.data import Mixture, MixtureConfig, load_mixture
from mllm.data.mixture import most_rows, read_mixture_config
from tests.mllm.data.conftest import record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files: ten rows of `letters`, four of `digits`."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "digits").mkdir()
    for path, rows in (("letters.json", 10), ("digits/digits.json", 4)):
        (folder / path).write_text(json.dumps([record(f"question {row}", f"answer {row}") for row in range(rows)]))
    return folder


def mixture(folder, *weights):
    files = ("letters.json", "digits/digits.json")
    sources = [{"path": path, "weight": weight} for path, weight in zip(files, weights, strict=True)]
    return Mixture(MixtureConfig(sources=sources), folder=folder)


def test_rows_of_all_sources_follow_one_another(folder):
    mixed = mixture(folder, 1.0, 1.0)
    assert [mixed[index].where.rpartition("/")[2] for index in (0, 9, 10, 13)] == [
        "letters.json: row 1", "letters.json: row 10", "digits.json: row 1", "digits.json: row 4"]  # fmt: skip
    assert (len(mixed), mixed.sources, mixed.domains) == (14, ["digits", "letters"], ["digits", "letters"])
    with pytest.raises(IndexError):
        mixed[14]


def test_weight_one_takes_each_row_once_an_epoch(folder):
    assert sorted(mixture(folder, 1.0, 1.0).order(seed=0, epoch=3)) == list(range(14))


def test_weight_multiplies_how_often_rows_are_drawn(folder):
    mixed = mixture(folder, 0.5, 2.0)
    order = mixed.order(seed=0, epoch=0)
    assert len(order) == mixed.epoch_length == 5 + 8
    assert [count for row, count in Counter(order.tolist()).items() if row >= 10] == [2] * 4


@given(st.integers(0, 50), st.sampled_from([0.3, 0.5, 0.7, 1.5]), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_over_epochs_no_row_is_drawn_twice_more_than_another(folder, seed, weight, epochs):
    mixed = mixture(folder, weight, 1.0)
    drawn = np.concatenate([mixed.order(seed, epoch) for epoch in range(epochs)])
    counts = np.bincount(drawn, minlength=14)[:10]
    assert counts.max() - counts.min() <= 1


def test_order_depends_on_nothing_but_seed_and_epoch(folder):
    mixed = mixture(folder, 0.5, 2.0)
    first = mixed.order(seed=1, epoch=2)
    mixed.order(seed=5, epoch=0)
    np.random.seed(3)
    assert np.array_equal(first, mixture(folder, 0.5, 2.0).order(seed=1, epoch=2))
    assert not np.array_equal(first, mixed.order(seed=1, epoch=3))
    assert not np.array_equal(first, mixed.order(seed=2, epoch=2))


def test_epochs_mix_the_sources(folder):
    order = mixture(folder, 1.0, 1.0).order(seed=0, epoch=0)
    assert sorted(order[order < 10]) != list(order[:10])
    assert any(order[:10] >= 10)


def test_stand_ins_are_the_other_rows_of_the_same_source_in_an_order_of_their_own(folder):
    mixed = mixture(folder, 1.0, 1.0)
    drawn = [mixed.stand_ins(row) for row in range(10, 14)]
    assert [sorted([row, *others]) for row, others in zip(range(10, 14), drawn, strict=True)] == [[10, 11, 12, 13]] * 4
    assert drawn == [mixture(folder, 1.0, 1.0).stand_ins(row) for row in range(10, 14)]


def test_bad_rows_that_lie_together_have_many_stand_ins(folder):
    (folder / "many.json").write_text(json.dumps([record("a", "b")] * 1000))
    many = load_mixture(folder / "many.json")
    first = [many.stand_ins(row)[0] for row in range(100)]
    assert len(set(first)) > 80
    assert len(many.stand_ins(0)) == 100


def test_a_bad_record_is_no_stand_in_and_names_no_domain(folder):
    rows = [record("a", "b", source="s"), record("a", source="t"), record("a", "b", source="s"), 3]
    (folder / "bad.json").write_text(json.dumps(rows))
    mixed = load_mixture(folder / "bad.json", bad_rows="skip")
    assert (list(mixed.bad), mixed.domains, mixed.sources) == ([1, 3], ["s"], ["s"])
    assert (mixed.stand_ins(0), sorted(mixed.stand_ins(3))) == ([2], [0, 2])
    assert mixed.source_of_row == ["s"] * 4


def test_every_file_that_cannot_be_read_is_named(folder):
    (folder / "two.yaml").write_text("sources: [{path: gone.json}, {path: letters.json}, {path: lost.json}]\n")
    with pytest.raises(UserError, match=r"(?s)gone\.json.*lost\.json"):
        load_mixture(folder / "two.yaml")


@pytest.mark.parametrize(("limit", "allowed"), [("1%", 2), ("2.5 %", 5), (0.01, 2), (3, 3), (0, 0), ("100%", 200)])
def test_a_limit_is_a_number_of_rows_or_a_share_of_them(limit, allowed):
    assert most_rows(limit, 200) == allowed


def test_the_former_name_of_the_policy_is_read():
    assert MixtureConfig(sources=[{"path": "a"}], bad_images="skip").bad_rows == "skip"


def test_policies_given_replace_those_of_the_file(folder):
    (folder / "policy.yaml").write_text("bad_rows: skip\nmax_bad: 3\nsources: [{path: letters.json}]\n")
    config = load_mixture(folder / "policy.yaml", bad_rows=None, max_bad="1%", too_long="truncate").config
    assert (config.bad_rows, config.max_bad, config.too_long) == ("skip", "1%", "truncate")


def test_paths_are_relative_to_the_yaml_file(folder, monkeypatch, tmp_path):
    (folder / "mix.yaml").write_text("sources:\n  - path: digits/digits.json\n    name: mine\n    domain: ours\n")
    monkeypatch.chdir(tmp_path)
    loaded = load_mixture(folder / "mix.yaml")
    assert (len(loaded), loaded.sources, loaded.domains) == (4, ["mine"], ["ours"])


def test_a_data_file_is_a_mixture_of_itself(folder):
    assert load_mixture(folder / "letters.json").sources == ["letters"]


BAD_MIXTURES = {
    "unknown key of a source": ({"sources": [{"path": "a", "wieght": 2}]}, r"sources.0.wieght: .*mean `weight`\?"),
    "unknown key": ({"souces": []}, r"souces: unknown key; did you mean `sources`\?"),
    "nothing near": ({"sources": [{"path": "a", "xyz": 2}]}, "known keys: path, image_root"),
    "no sources": ({"sources": []}, "sources: .*at least 1 item"),
    "no path": ({"sources": [{"name": "a"}]}, "sources.0.path: Field required"),
    "weight zero": ({"sources": [{"path": "a", "weight": 0}]}, "sources.0.weight: .*greater than 0"),
    "weight a word": ({"sources": [{"path": "a", "weight": "much"}]}, "sources.0.weight: .*got 'much'"),
    "policy": ({"sources": [{"path": "a"}], "bad_rows": "ignore"}, "bad_rows: .*'error' or 'skip'"),
    "limit": ({"sources": [{"path": "a"}], "max_bad": "many"}, r"max_bad: .*a share of them \("),
    "limit above all rows": ({"sources": [{"path": "a"}], "max_bad": 1.5}, "max_bad: .*expected a number of rows"),
    "length": ({"sources": [{"path": "a"}], "too_long": "cut"}, "too_long: .*'error', 'skip' or 'truncate'"),
    "a list": ([1], "expected a mapping"),
}


@pytest.mark.parametrize("name", BAD_MIXTURES)
def test_bad_mixture_is_named_by_file_and_key(name, tmp_path):
    content, message = BAD_MIXTURES[name]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=f"(?s)mix.yaml: .*{message}"):
        load_mixture(tmp_path / "mix.yaml")


def test_malformed_yaml_is_named_with_its_line(tmp_path):
    (tmp_path / "mix.yaml").write_text("sources:\n  - path: a\n   name: b\n")
    with pytest.raises(UserError, match=r"(?s)mix.yaml: malformed YAML.*line 3"):
        load_mixture(tmp_path / "mix.yaml")


def test_missing_mixture_is_named():
    with pytest.raises(UserError, match=r"no such mixture file: none.yaml"):
        load_mixture("none.yaml")


@pytest.mark.parametrize(
    "path", sorted(Path(data_recipes.__path__[0], "mixtures").glob("*.yaml")), ids=lambda p: p.name
)
def test_mixtures_that_come_with_us_are_valid(path):
    assert read_mixture_config(path).sources
