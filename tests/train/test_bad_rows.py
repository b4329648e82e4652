"""Rows that cannot be used: found before a run where they can be, replaced, listed and bounded where they are met."""

import json
from types import SimpleNamespace

import pytest

from mllm.common.errors import UserError
from mllm.data import BadRow, ConversationEncoder, EncodedMixture, load_mixture
from tests.tiny import tiny_llava
from tests.train.data import make_row, write_config, write_rows
from tests.train.ranks import run_stage
from train.bad_rows import BAD_ROWS, BadRows
from train.check import check_rows, check_run
from train.config import load_config
from train.feed import RunOrder

LONG, NO_ANSWER, GONE, BROKEN = 9, 21, 22, 40  # rows that are spoilt, one of each kind


def spoil(folder):
    """A bad record, a missing picture, a broken one and a long row among the 64 rows."""
    rows = [make_row(number) for number in range(64)]
    rows[LONG]["conversations"][1]["value"] = "no " * 300
    del rows[NO_ANSWER]["conversations"][1]
    rows[GONE]["image"] = "gone.png"
    rows[BROKEN]["image"] = "broken.png"
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG\r\n")
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_config(folder)
    spoil(folder)
    return folder


@pytest.fixture(scope="module")
def encoder():
    return ConversationEncoder(tiny_llava()[1], 256)


def test_whatever_can_be_foreseen_is_told_before_the_run(folder, encoder):
    rows = json.loads((folder / "train.json").read_text())
    del rows[NO_ANSWER]
    (folder / "readable.json").write_text(json.dumps(rows))
    (folder / "readable.yaml").write_text("sources: [{path: readable.json, image_root: images}]\n")
    with pytest.raises(UserError, match=r"(?s)row 10 .*more than max_length 256.*row 22 .*no image file"):
        check_rows(load_mixture(folder / "readable.yaml"), encoder)


@pytest.mark.parametrize(("policy", "passes"), [({"max_bad": 3}, True), ({"max_bad": "4%"}, False), ({}, True)])
def test_more_bad_rows_than_allowed_are_refused_before_the_run(policy, passes, folder, encoder):
    mixture = load_mixture(folder / "mixture.yaml", bad_rows="skip", **policy)
    if passes:
        check_rows(mixture, encoder)
        return
    with pytest.raises(UserError, match=r"(?s)3 of 64 rows cannot be used.*max_bad 4% allows \(2\).*row 10 "):
        check_rows(mixture, encoder)


def test_the_runs_settings_replace_those_of_the_mixture(folder):
    settings = ["data.bad_rows=skip", "data.too_long=truncate", "data.max_bad=50%", f"run.output_dir={folder}/new"]
    config = check_run(load_config(folder / "config.yaml", settings), ranks=1).config
    assert (config.bad_rows, config.too_long, config.max_bad) == ("skip", "truncate", "50%")
    with pytest.raises(UserError, match=r"max_bad: .*expected a number of rows"):
        check_run(load_config(folder / "config.yaml", [*settings, "data.max_bad=lots"]), ranks=1)


def bad(index: int, action: str = "skipped") -> BadRow:
    return BadRow(index, "numbers", "too long", f"row {index} is too long", action)


@pytest.fixture
def mixture(tmp_path):
    return load_mixture(write_rows(tmp_path), bad_rows="skip", max_bad=3)


def test_a_row_is_listed_and_counted_once(mixture, tmp_path):
    rows = BadRows(tmp_path / BAD_ROWS, mixture)
    rows.add([bad(3), bad(5)])
    assert rows.gather(step=1) == 2
    rows.add([bad(5), bad(7, "cut")])
    assert rows.gather(step=2) == 1
    assert rows.counts() == {"bad_rows/cut/numbers/too long": 1, "bad_rows/skipped/numbers/too long": 2}
    listed = [json.loads(line) for line in (tmp_path / BAD_ROWS).read_text().splitlines()]
    assert [(entry["index"], entry["step"]) for entry in listed] == [(3, 1), (5, 1), (7, 2)]


def test_a_run_stops_at_more_bad_rows_than_the_mixture_allows(mixture, tmp_path):
    rows = BadRows(tmp_path / BAD_ROWS, mixture)
    rows.add([bad(1), bad(2), bad(3), bad(4, "cut")])
    rows.gather(step=1)
    rows.add([bad(9)])
    with pytest.raises(UserError, match=r"4 of 64 rows cannot be used \(up to step 2; .*bad_rows.jsonl lists them\)"):
        rows.gather(step=2)


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(mixture, tmp_path):
    rows = BadRows(tmp_path / BAD_ROWS, mixture)
    for step in (1, 2):
        rows.add([bad(step)])
        rows.gather(step)
    (tmp_path / BAD_ROWS).open("a").write('{"ste')  # killed while it wrote
    resumed = BadRows(tmp_path / BAD_ROWS, mixture)
    resumed.on_train_begin(None, SimpleNamespace(global_step=1), None)
    assert list(resumed.known) == [1]
    resumed.add([bad(1), bad(2)])
    assert resumed.gather(step=2) == 1
    assert len((tmp_path / BAD_ROWS).read_text().splitlines()) == 2


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_a_run_of_two_ranks_lists_what_its_order_meets(folder, encoder):
    run_stage(folder / "config.yaml", f"run.output_dir={folder}/run", "run.steps=8", "data.bad_rows=skip",
              "data.max_length=256", "run.log_every=4", "run.save_every=5")  # fmt: skip
    mixture = load_mixture(folder / "mixture.yaml", bad_rows="skip")
    order = RunOrder(mixture, seed=0, steps=8, batch_size=8, micro_batch_size=8, rank=0, world=1)
    samples = EncodedMixture(mixture, encoder)
    met = {
        told.index: (step, told.instead)
        for step, rows in reversed(list(enumerate(order, 1)))
        for row in rows
        for told in samples[row].get("bad_rows", [])
    }
    listed = [json.loads(line) for line in (folder / "run" / BAD_ROWS).read_text().splitlines()]
    assert {row["index"]: row["instead"] for row in listed} == {row: instead for row, (_, instead) in met.items()}
    assert all(step <= entry["step"] for entry in listed for step in [met[entry["index"]][0]])
    entries = [json.loads(line) for line in (folder / "run" / "train_log.jsonl").read_text().splitlines()]
    last = [entry for entry in entries if "loss" in entry][-1]
    assert sum(value for key, value in last.items() if key.startswith("bad_rows/")) == len(listed) == 4
