import json
import re

import pytest

from mllm.data import ConversationEncoder, check, check_mixture, load_mixture
from mllm.data.check_page import write_check
from tests.mllm.data.conftest import record
from tests.tiny import tiny_image


@pytest.fixture(scope="module")
def mixture(root):
    rows = [
        record("<image>", "good", image="red.png", source="a"),
        record("<image>", "bad", image="truncated.png", source="b"),
        record("<image>", "lost", image="none.png", source="b"),
        record("a long question " * 20, "long", source="a", id="long"),
    ]
    (root / "check.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_mixture(root / "check.jsonl")


def bad_rows(report):
    return [row.index for row in report.bad]


def test_missing_and_undecodable_pictures_are_found(mixture):
    report = check_mixture(mixture, progress=False)
    assert bad_rows(report) == [1, 2]
    assert "row 2: image" in report.bad[0].error
    assert (report.rows, report.rows_of_source, report.ok) == (4, {"a": 2, "b": 2}, False)


def test_without_decoding_only_missing_pictures_are_found(mixture):
    assert bad_rows(check_mixture(mixture, decode=False, progress=False)) == [2]


def test_several_processes_find_the_same(mixture, encoder, monkeypatch):
    alone = check_mixture(mixture, encoder, progress=False)
    monkeypatch.setattr(check._RowCheck, "ROWS_FOR_PROCESSES", 1)
    monkeypatch.setattr(check._RowCheck, "BATCH", 2)
    assert check_mixture(mixture, encoder, progress=False) == alone


def test_an_encoder_finds_rows_that_are_too_long_too(mixture, processor):
    assert bad_rows(check_mixture(mixture, ConversationEncoder(processor, 100), progress=False)) == [1, 2, 3]


def test_an_encoder_tells_the_longest_row(mixture, encoder):
    report = check_mixture(mixture, encoder, progress=False)
    assert report.longest == len(encoder.encode(mixture[3])["input_ids"])
    assert report.longest_where.endswith("row 4 (id long)")


def test_report_reads_as_text_and_is_written_as_jsonl(mixture, tmp_path):
    report = check_mixture(mixture, progress=False)
    assert str(report).startswith(
        "4 rows, 2 bad\n  a: 2 rows, 0 bad\n  b: 2 rows, 2 bad (missing picture 1, picture 1)\n"
    )
    report.write(tmp_path / "bad.jsonl")
    assert [json.loads(line)["index"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [1, 2]


def test_bad_records_lines_and_pictures_are_named_in_one_pass(root):
    two = record("<image> or <image>", "x", image=["none.png", "text.png"])
    rows = [record("a", "b"), record("a"), two, record("<image>", "x"), record("<image>", "x", image="truncated.png")]
    (root / "all.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nno json")
    report = check_mixture(load_mixture(root / "all.jsonl", keep_bad=True), progress=False)
    assert [(bad.index, bad.reason) for bad in report.bad] == [
        (1, "record"), (2, "missing picture"), (3, "record"), (4, "picture"), (5, "record")]  # fmt: skip
    assert "none.png" in report.bad[1].error
    assert "text.png" in report.bad[1].error


def test_rows_that_would_be_cut_are_told_apart_from_those_too_long_even_so(root, processor):
    rows = [record("One?", "yes", "Two?", "no " * 200), record("One?", "no " * 200), record("One?", "yes")]
    (root / "long.json").write_text(json.dumps(rows))
    mixture = load_mixture(root / "long.json", too_long="truncate")
    for decode in (True, False):
        report = check_mixture(mixture, ConversationEncoder(processor, 100), decode=decode, progress=False)
        assert ([row.index for row in report.cut], bad_rows(report)) == ([0], [1])


def test_rows_that_repeat_and_pictures_of_an_evaluation_set_are_found(root):
    seen = tiny_image("red", 60)
    seen.paste("white", (10, 20, 30, 50))
    seen.save(root / "seen.png")
    seen.resize((33, 33)).save(root / "smaller.jpg", quality=60)
    ours = [record("<image>", "x", image="seen.png"), record("<image>", "x", image="blue.png")]
    for name, rows in (("train", [*ours, ours[0]]), ("test", [record("<image>", "y", image="smaller.jpg")])):
        (root / f"{name}.json").write_text(json.dumps(rows))
    report = check_mixture(load_mixture(root / "train.json"), progress=False, hashes=True)
    assert report.twins == [[0, 2]]
    pairs = check.check_overlap(report, load_mixture(root / "test.json"), progress=False)
    assert pairs == [(str(root / "seen.png"), str(root / "smaller.jpg"))]


def test_the_page_and_its_figures_hold_counts_reasons_and_samples(mixture, encoder, tmp_path):
    report = check_mixture(mixture, encoder, progress=False, hashes=True)
    write_check(tmp_path, report, mixture, encoder, title="<b>mine</b>")
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["sources"]["b"]["bad"] == {"missing picture": 1, "picture": 1}
    assert sum(each["rows"] for each in found["lengths"]) == 2
    assert found["total"]["epoch_tokens"] == sum(sizes.tokens for sizes in report.sizes)
    page = (tmp_path / "check.html").read_text()
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert "truncated.png cannot be decoded" in page
    assert "text-decoration: underline" in page
    assert not re.search(r"(src|href)=|<script|<link", page)
