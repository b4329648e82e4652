"""Second layouts, places of pictures, rotations, and a benchmark of one's own."""

import io
import json
import pickle
from pathlib import Path

import pytest

from mllm.common.errors import UserError
from mllm.data.conversation import IMAGE_PLACE
from mllm.data.formats import EmbeddedImage
from mllm.evaluation.benchmarks import Selection, find
from tests.mllm.evaluation.benchmarks.layouts import COLOURS, LAYOUTS, columns, encoded, lines, put, show, table


def made(name: str, folder: Path) -> Path:
    LAYOUTS[name](folder)
    return folder


def test_popes_ids_are_llavas_where_its_file_is_there_whatever_its_order(tmp_path):
    made("pope", tmp_path)
    plain = find("pope").conversations(tmp_path)
    about = [
        {"question_id": 100 + n, "image": row.images[0].name, "text": f"{row.question.splitlines()[0]}\nOne word.",
         "category": row.qtype}
        for n, row in enumerate(plain)
    ]  # fmt: skip
    lines(tmp_path / "llava_pope_test.jsonl", about[::-1])
    again = find("pope").conversations(tmp_path)
    assert [row.id for row in again] == [f"{row.qtype}-{100 + n}" for n, row in enumerate(plain)]
    assert [row.answers for row in again] == [row.answers for row in plain]


@pytest.mark.parametrize("name", ["vqa_rad", "pathvqa"])
def test_medical_sets_are_read_from_the_hubs_parquet_too(name, tmp_path):
    rows = [
        {"image": {"bytes": encoded(colour), "path": None}, "question": "is it?", "answer": ["yes", "lung"][n % 2]}
        for n, colour in enumerate(COLOURS)
    ]
    columns(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    read = find(name).conversations(tmp_path)
    assert [row.metric for row in read[:2]] == ["closed_accuracy", "open_recall"]
    assert isinstance(read[0].images[0], EmbeddedImage)


def test_vqa_rads_splits_are_told_by_the_kind_of_phrase(tmp_path):
    made("vqa_rad", tmp_path)
    assert [row.id for row in find("vqa_rad").conversations(tmp_path, split="train")] == ["9"]


def test_a_pickle_that_would_run_code_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    path = tmp_path / "qas" / "test" / "test_qa.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(UserError, match="would run builtins"):
        find("pathvqa").conversations(tmp_path)


def test_mmmus_pictures_stand_where_question_and_options_have_them(tmp_path):
    made("mmmu", tmp_path)
    first, second, _, fourth, last = find("mmmu").conversations(tmp_path)
    assert first.turns[0].text.startswith(f"{IMAGE_PLACE}\nWhich colour?")
    assert second.turns[0].text.startswith(f"Which colour has {IMAGE_PLACE}?")
    assert "B. blue image 2" in second.turns[0].text  # the row has no such picture
    assert fourth.turns[0].text.count(IMAGE_PLACE) == 2
    assert [bytes(image) for image in fourth.images] == [encoded("white"), encoded("pink")]
    assert (last.metric, last.options, last.answers) == ("mmmu_open", (), ("black",))


def test_mmbench_takes_another_rows_picture_by_its_index(tmp_path):
    made("mmbench", tmp_path)
    rows = find("mmbench").conversations(tmp_path)
    assert rows[4].images == rows[0].images
    assert rows[0].options == ("red", "blue")
    assert "Look closely.\nWhich" in rows[1].turns[0].text


def test_circular_rows_keep_the_right_options_text(tmp_path):
    made("mmbench", tmp_path)
    plain = {row.id: row for row in find("mmbench").conversations(tmp_path)}
    turned = find("mmbench_circular").conversations(tmp_path)
    assert len(turned) == sum(len(row.options) for row in plain.values())
    for row in turned:
        origin = plain[str(int(row.id) % 1_000_000)]
        assert row.options["ABCD".index(row.answers[0])] == origin.options["ABCD".index(origin.answers[0])]


def test_seed_leaves_out_videos_and_slake_the_other_language(tmp_path):
    assert len(find("seed").conversations(made("seed", tmp_path / "a"))) == 5
    assert {row.answers for row in find("slake").conversations(made("slake", tmp_path / "b"))} == {("Lung",)}
    assert {row.answers for row in find("slake_zh").conversations(tmp_path / "b")} == {("肺",)}


def test_llavas_questions_without_answers_are_refused_by_id(tmp_path):
    made("llava_questions", tmp_path)
    (tmp_path / "answers_gpt4.jsonl").unlink()
    with pytest.raises(UserError, match="question 0 has no answer"):
        find("llava_questions").conversations(tmp_path)


# -- one's own ---------------------------------------------------------------------------------------------------------

OWN = "name: birds\ndata: {data}\ncolumns: {{question: ask, answer: reply, image: photo}}\n{more}"


def own(tmp_path, data, more="") -> Path:
    (tmp_path / "birds.yaml").write_text(OWN.format(data=data, more=more))
    return tmp_path / "birds.yaml"


def rows_of(tmp_path, path):
    return Selection(root=tmp_path, asked=(str(path),)).read()


def records(embed=True):
    return [
        {
            "ask": "Which?",
            "reply": colour,
            "photo": {"bytes": encoded(colour), "path": None} if embed else f"{colour}.png",
        }
        for colour in COLOURS
    ]


def test_a_parquet_with_columns_named_in_a_yaml(tmp_path):
    columns(tmp_path / "birds" / "part.parquet", records())
    rows = rows_of(tmp_path, own(tmp_path, "'*.parquet'"))
    assert [row.answers for row in rows] == [(colour,) for colour in COLOURS]
    assert (rows[0].source, rows[0].metric, len(rows[0].images)) == ("birds", "exact_match", 1)


def test_a_folder_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    pictures = [Image.open(io.BytesIO(encoded(colour))) for colour in COLOURS]
    data = datasets.Dataset.from_dict({"ask": ["Which?"] * 5, "reply": COLOURS, "photo": pictures})
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "saved"))
    rows = rows_of(tmp_path, own(tmp_path, "saved"))
    assert [row.answers for row in rows] == [(colour,) for colour in COLOURS]
    assert all(isinstance(row.images[0], EmbeddedImage) for row in rows)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv"])
def test_a_file_that_names_its_pictures(kind, tmp_path):
    for colour in COLOURS:
        show(tmp_path / "photos" / f"{colour}.png", colour)
    (table if kind in ("csv", "tsv") else put)(tmp_path / f"rows.{kind}", records(embed=False))
    rows = rows_of(tmp_path, own(tmp_path, f"rows.{kind}", "images: photos"))
    assert [row.images[0].name for row in rows] == [f"{colour}.png" for colour in COLOURS]


def test_options_may_be_right_by_letter_index_or_text(tmp_path):
    more = 'metric: option_letter\nprompt: "{question}\\n{options}"\n'
    path = own(tmp_path, "rows.json", more)
    path.write_text(path.read_text().replace("image: photo", "options: of"))
    put(tmp_path / "rows.json", [{"ask": "?", "reply": right, "of": ["x", "y"]} for right in ("B", 1, "y")])
    assert {row.answers for row in rows_of(tmp_path, path)} == {("B",)}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("metrc: anls", "metrc"),
        ("metric: anlss", "no metric 'anlss'"),
        ("metric: option_letter", "columns lack options"),
        ("domain: medical", "domain"),
    ],
)
def test_what_is_wrong_in_a_yaml_is_told(more, told, tmp_path):
    with pytest.raises(UserError, match=told):
        rows_of(tmp_path, own(tmp_path, "rows.json", more))


def test_a_column_that_the_data_lacks_is_named(tmp_path):
    put(tmp_path / "rows.json", [{"ask": "?", "answer": "x"}])
    with pytest.raises(UserError, match=r"birds test row 1 .*reply"):
        rows_of(tmp_path, own(tmp_path, "rows.json"))
    assert json.loads((tmp_path / "rows.json").read_text())
