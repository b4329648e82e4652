import gzip
import json

import pytest

from mllm.common.errors import RowError, UserError
from mllm.data import ImageError, Source
from tests.mllm.data.conftest import record


def write(root, name, records):
    path = root / name
    as_lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, records)) if as_lines else json.dumps(records, indent=1))
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_and_jsonl_give_the_same_conversations(name, root):
    path = write(root, name, [record("<image>", "red", image="red.png", id="a"), record("Wie geht's?", "schön ☺")])
    source = Source(path)
    assert [row.turns[1].text for row in source] == ["red", "schön ☺"]
    assert source[0].images == (root / "red.png",)
    assert source[0].where == f"{path}: row 1 (id a)"
    assert (source[-1].where, source[1].source) == (f"{path}: row 2", "rows")


def test_name_and_domain_of_the_source_replace_those_of_its_rows(root):
    path = write(root, "named.json", [record("a", "b", source="x", domain="y")])
    row = Source(path, name="mine", domain="ours")[0]
    assert (row.source, row.domain) == ("mine", "ours")


def test_rows_keep_their_own_names_otherwise(root):
    source = Source(write(root, "own.json", [record("a", "b", source="x", domain="y"), record("a", "b", source="z")]))
    assert (source.source_of_row, source.domain_of_row) == (["x", "z"], ["y", "z"])


def test_bad_row_stops_the_opening(root):
    path = write(root, "bad.json", [record("a", "b"), record("a")])
    with pytest.raises(UserError, match=r"bad.json: row 2, turn 1: human turn without an answer"):
        Source(path)


def test_missing_picture_is_told_when_its_row_is_taken(root):
    source = Source(write(root, "lost.json", [record("<image>", "b", image="lost.png", id=5)]))
    with pytest.raises(ImageError, match=r"lost.json: row 1 \(id 5\): no image file .*lost.png"):
        source[0]


def test_missing_picture_is_let_be_when_only_text_is_wanted(root):
    path = write(root, "lost.json", [record("<image>", "b", image="lost.png")])
    assert Source(path, image_root="nowhere", check_files=False)[0].answers == ("b",)


def test_rows_of_jsonl_are_counted_by_line(root):
    (root / "gap.jsonl").write_text(json.dumps(record("a", "b")) + "\n\n" + json.dumps(record("c", "d")) + "\n")
    assert [row.where.rpartition(" ")[2] for row in Source(root / "gap.jsonl")] == ["1", "3"]


BAD_FILES = {
    "malformed.json": ('[\n {"a": 1,}\n]', "malformed JSON at line 2, column"),
    "malformed.jsonl": ('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n{"a": ',
                        "row 2: malformed JSON at line 2, column"),
    "cut.json": ('[{"a": 1}', "malformed JSON at line 1, column 10"),
    "none.json": ("[]", "no records"),
    "blank.jsonl": ("\n", "no records"),
    "numbers.json": ("[1, 2]", "row 1: expected a record"),
    "digits.json": ('[{"id": ' + "9" * 5000 + "}]", "JSON that cannot be read"),
    "nested.jsonl": ("[" * 2 + '"a"' + "]" * 2, "row 1: expected a record"),
    "deep.jsonl": ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "row 1: JSON that cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_with_the_place(name, tmp_path):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        Source(tmp_path / name)


def test_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "data.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"data.json: not UTF-8"):
        Source(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("content", "kind"), [(b"PAR1\x15\x04", "parquet"), (b"PK\x03\x04", "zip"), (b"x" * 257 + b"ustar\x00", "tar")]
)
def test_another_kind_of_file_is_named_as_what_it_is(content, kind, tmp_path):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=f"data.json: this is a {kind}"):
        Source(tmp_path / "data.json")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_gzip_of_records_reads_like_the_records(name, root, tmp_path):
    plain = write(root, name, [record("a", "schön"), record("c", "d")])
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert [row.turns for row in Source(tmp_path / f"{name}.gz")] == [row.turns for row in Source(plain)]


def test_a_line_that_is_no_text_is_a_bad_row_among_good_ones(tmp_path):
    good = json.dumps(record("a", "b")).encode()
    (tmp_path / "rows.jsonl").write_bytes(good + b"\n\xff\xfe{}\n" + good + b"\n{")
    source = Source(tmp_path / "rows.jsonl", keep_bad=True)
    assert (len(source), list(source.bad)) == (4, [1, 3])
    with pytest.raises(RowError, match=r"row 2: not UTF-8 text \(byte 0 of the line\)"):
        source[1]
    assert source[2].turns[1].text == "b"


def test_refused_bad_rows_are_named_together_and_counted(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([record("a", "b"), *[record("a")] * 5]))
    with pytest.raises(UserError, match=r"(?s)row 2,.*row 3,.*row 4,.*and 2 rows more"):
        Source(tmp_path / "rows.json")


def test_missing_file_and_missing_root_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no such data file: .*none.json"):
        Source(tmp_path / "none.json")
    with pytest.raises(UserError, match="image root nowhere is not a folder"):
        Source(tmp_path / "none.json", image_root="nowhere")


def test_rows_that_begin_with_an_answer_are_counted_when_the_file_is_opened(tmp_path, caplog):
    turns = [{"from": name, "value": "x"} for name in ("gpt", "human", "gpt")]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns}, {"conversations": turns[1:]}]))
    source = Source(tmp_path / "rows.json")
    assert "rows.json: 1 rows begin with a turn of the assistant" in caplog.text
    assert [len(row.turns) for row in source] == [2, 2]
