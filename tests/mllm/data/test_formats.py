"""The layouts that people have their rows in: each reads as the same conversations, or is refused in words."""

import base64
import json

import pytest

from mllm.common.errors import UserError
from mllm.data import Conversation, ImageError, load_mixture, open_image
from mllm.data.formats import EmbeddedImage
from tests.mllm.data.conftest import record

ASKED = ("What colour?", "Which shape?", "How many?", "Where?", "Is it day?")  # one picture and one question a row


def parts(question, picture):
    return [picture, {"type": "text", "text": f"\n{question}"}]


# Name -> a row of that layout for a question, its answer and the file of its picture.
LAYOUTS = {
    "LLaVA": lambda q, a, f: record(f"<image>\n{q}", a, image=f),
    "LLaVA-Med": lambda q, a, f: {
        "id": "x", "image": f, "domain": {"mri": False, "ct": False},
        "conversatons": record(f"<image>\n{q}", a)["conversations"],
    },
    "LLaVA-NeXT, no mark": lambda q, a, f: record(q, a, image=f),
    "ShareGPT, list of images": lambda q, a, f: record(f"<image>\n{q}", a, images=[f]),
    "messages": lambda q, a, f: messages(f"<image>\n{q}", a, images=[f]),
    "messages, marks as parts": lambda q, a, f: messages(parts(q, {"type": "image"}), a, images=[f]),
    "messages, no mark in parts": lambda q, a, f: messages([{"type": "text", "text": f"\n{q}"}], a, image=f),
    "OpenAI": lambda q, a, f: messages(parts(q, {"type": "image_url", "image_url": {"url": f}}), [text(a)]),
    "OpenAI, address as text": lambda q, a, f: messages(parts(q, {"type": "image_url", "image_url": f}), a),
    "Qwen": lambda q, a, f: messages(parts(q, {"type": "image", "image": f"file://{f}"}), a),
    "path of a datasets image": lambda q, a, f: record(f"<image>\n{q}", a, image={"bytes": None, "path": f}),
    "ms-swift": lambda q, a, f: {"query": f"<image>\n{q}", "response": a, "images": [f]},
    "alpaca": lambda q, a, f: {"instruction": "<image>", "input": q, "output": a, "image": f},
    "question and answer": lambda q, a, f: {"question": q, "answer": a, "image": f},
}  # fmt: skip


def text(words):
    return {"type": "text", "text": words}


def messages(question, answer, **keys):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **keys}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_rows_of_a_layout_read_as_llavas_own(layout, root):
    files = ["red.png", "green.png", "blue.png", "red.png", "green.png"]
    rows = [LAYOUTS[layout](q, f"answer {k}", f) for k, (q, f) in enumerate(zip(ASKED, files, strict=True))]
    (root / "layout.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = load_mixture(root / "layout.jsonl")
    assert [[turn.text for turn in row.turns] for row in read] == [
        [f"<image>\n{q}", f"answer {k}"] for k, q in enumerate(ASKED)
    ]
    assert [row.images for row in read] == [(root / name,) for name in files]
    assert read.domains == ["layout"]


def read(row, root, **options):
    return Conversation.from_record(row, image_root=root, where="data.json: row 7", **options)


@pytest.mark.parametrize("layout", ["data URL", "bytes", "data URL in a part"])
def test_a_picture_in_the_row_itself_is_read(layout, root):
    data = base64.b64encode((root / "red.png").read_bytes()).decode()
    url = f"data:image/png;base64,{data}"
    row = read(
        {
            "data URL": record("<image>\nWhich?", "red", image=url),
            "bytes": record("<image>\nWhich?", "red", images=[{"bytes": data, "path": "red.png"}]),
            "data URL in a part": messages(parts("Which?", {"type": "image_url", "image_url": {"url": url}}), "red"),
        }[layout],
        root,
    )
    (image,) = row.images
    assert open_image(image, where="row 7").getpixel((0, 0)) == (255, 0, 0)
    assert str(image).startswith("embedded-")


def test_a_broken_picture_in_the_row_itself_is_named_shortly(root):
    row = read(record("<image>\nWhich?", "red", image="data:image/png;base64," + "A" * 40_000), root)
    assert isinstance(row.images[0], EmbeddedImage)
    with pytest.raises(ImageError, match=r"row 7: image embedded-\w+ cannot be decoded") as refusal:
        open_image(row.images[0], where="row 7")
    assert len(str(refusal.value)) < 400


def test_columns_named_in_the_mixture_are_read(root):
    rows = [{"prompt": q, "label": k, "picture": "red.png", "nr": k} for k, q in enumerate(ASKED)]
    (root / "columns.json").write_text(json.dumps(rows))
    (root / "columns.yaml").write_text(
        "sources:\n  - path: columns.json\n    columns: {question: prompt, answer: label, image: picture, id: nr}\n"
    )
    row = load_mixture(root / "columns.yaml")[2]
    assert ([turn.text for turn in row.turns], row.answers) == (["<image>\nHow many?", "2"], ("2",))
    assert row.where.endswith("row 3 (id 2)")
    (root / "columns.yaml").write_text("sources:\n  - {path: columns.json, columns: {qestion: prompt}}\n")
    with pytest.raises(UserError, match=r"columns\.qestion"):
        load_mixture(root / "columns.yaml")


def test_the_history_of_a_row_goes_before_its_question(root):
    row = read({"query": "c", "response": "d", "history": [["<image> a", "b"]], "image": "red.png"}, root)
    assert [turn.text for turn in row.turns] == ["<image> a", "b", "c", "d"]


def test_all_answers_of_a_row_are_accepted_and_the_first_is_learnt(root):
    row = read({"question": "a", "answer": ["b", "c"]}, root)
    assert (row.turns[1].text, row.answers) == ("b", ("b", "c"))


def test_the_one_true_flag_of_llava_med_is_the_domain(root):
    flags = {"mri": True, "ct": False}
    assert read(record("a", "b", domain=flags), root).domain == "mri"
    assert read(record("a", "b", domain={**flags, "ct": True}), root, source="s").domain == "s"


REFUSED = {
    "video": (record("a", "b", video="a.mp4"), "`video` holds video, which is not trained on here"),
    "audio": (record("a", "b", audios=["a.wav"]), "`audios` holds audio"),
    "tools": (messages("a", "b", tools=[{"name": "f"}]), "`tools` holds calls of tools"),
    "preference pair": ({"query": "a", "chosen": "b", "rejected": "c"}, "`chosen` holds preference pairs"),
    "turns under a misspelt key": ({"conversation": []}, "did you mean `conversations`"),
    "picture under a misspelt key": (record("<image>", "b", imgae="red.png"), "did you mean `image`"),
    "keys of no layout": ({"text": "a", "label": "b"}, "its keys are `text`, `label`.*columns: {question"),
    "two ways to name pictures": (
        messages(parts("a", {"type": "image", "image": "red.png"}), "b", images=["red.png"]),
        "pictures both in `image` and in the turns' parts",
    ),
    "an address": (
        messages(parts("a", {"type": "image_url", "image_url": {"url": "https://a.org/b.png"}}), "b"),
        "URL",
    ),
    "a data URL that is none": (record("<image>", "b", image="data:image/png,abc"), "a data URL must be"),
    "bytes that are no base64": (record("<image>", "b", image={"bytes": "?" * 99}), "is not base64"),
    "an answer that is a list of lists": ({"question": "a", "answer": [["b"]]}, "expected `answer` to be text"),
    "a history of one-sided turns": ({"query": "a", "response": "b", "history": ["c"]}, "expected `history`"),
    "a part of another kind": (messages([{"type": "video", "video": "a.mp4"}], "b"), "expected parts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_words(name, root):
    row, message = REFUSED[name]
    with pytest.raises(UserError, match=f"data.json: row 7.*{message}"):
        read(row, root)
