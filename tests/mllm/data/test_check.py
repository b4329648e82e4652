import json

import pytest

from mllm.data import ConversationEncoder, check, check_mixture, load_mixture
from tests.mllm.data.conftest import record


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
    assert str(report).startswith("4 rows, 2 bad\n  a: 2 rows, 0 bad\n  b: 2 rows, 2 bad\n")
    report.write(tmp_path / "bad.jsonl")
    assert [json.loads(line)["index"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [1, 2]
