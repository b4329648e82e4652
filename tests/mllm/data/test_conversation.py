from pathlib import Path

import pytest

from mllm.common.errors import UserError
from mllm.data import Conversation, ImageError, Turn
from tests.mllm.data.conftest import record


def read(data, root, **options):
    return Conversation.from_record(data, image_root=root, where="data.json: row 7", **options)


def test_a_llava_record_is_read_with_its_scoring_keys(root):
    data = record("<image>\nWhich colour?", "red", image="red.png", id=3, source="squares", domain="general",
                  metric="exact_match", answers=["red", "crimson"], qtype="colour", meta={"extra": 1})  # fmt: skip
    read_back = read(data, root)
    assert read_back == Conversation(
        id="3",
        turns=(Turn("user", "<image>\nWhich colour?"), Turn("assistant", "red")),
        images=(root / "red.png",),
        source="squares",
        domain="general",
        metric="exact_match",
        answers=("red", "crimson"),
        qtype="colour",
        where="data.json: row 7 (id 3)",
    )


def test_messages_with_parts_read_like_conversations(root):
    content = [{"type": "image"}, {"type": "text", "text": "\nWhich colour?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    expected = read(record("<image>\nWhich colour?", "red", image="red.png"), root)
    assert read({"messages": messages, "image": ["red.png"]}, root) == expected


def test_without_answers_the_last_turn_is_the_accepted_answer(root):
    assert read(record("Hello?", "hi", "Well?", "fine"), root).answers == ("fine",)


def test_names_given_replace_those_of_the_record(root):
    data = record("Hello?", "hi", source="theirs", domain="theirs")
    assert read(data, root, source="mine").source == "mine"
    assert read(data, root, domain="ours").domain == "ours"


def test_domain_is_the_source_when_the_record_names_none(root):
    assert read(record("Hello?", "hi", source="chat"), root).domain == "chat"


def test_question_is_the_last_one_without_image_marks(conversation):
    data = conversation("First?", "yes", "Compare <image>\nand <image>", "same", image=["red.png", "blue.png"])
    assert data.question == "Compare \nand"


BAD_RECORDS = {
    "human turn without an answer": (record("Hello?"), "turn 1: human turn without an answer"),
    "last human turn without an answer": (record("a", "b", "c"), "turn 3: human turn without an answer"),
    "two human turns": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "turn 2: expected a turn of 'gpt' or 'assistant'.*the human turn before has no answer",
    ),
    "answer first": ({"conversations": [{"from": "gpt", "value": "a"}]}, "turn 1: expected a turn of 'human'"),
    "empty answer": (record("Hello?", "  "), "turn 2: empty answer"),
    "empty question": (record("", "hi"), "turn 1: empty question"),
    "more marks than pictures": (
        record("<image> and <image>", "x", image="red.png"),
        r"more <image> marks \(2\) than pictures \(1\)",
    ),
    "mark without picture": (record("<image>", "x"), r"more <image> marks \(1\) than pictures \(0\)"),
    "fewer marks than pictures": (
        record("look <image>", "x", image=["red.png", "blue.png"]),
        r"fewer <image> marks \(1\) than pictures \(2\)",
    ),
    "mark in an answer": (record("look", "<image>", image="red.png"), "<image> stands in an answer"),
    "unknown role": ({"conversations": [{"from": "cat", "value": "miaow"}]}, "expected `from` to be one of"),
    "no turns": ({"id": 1}, "expected `conversations`"),
    "text is a number": (record("Hello?", 3), "turn 2: expected `value` to be text, got int"),
    "unknown part": (record([{"type": "video"}], "x"), "expected parts"),
    "picture is a number": (record("<image>", "x", image=3), "expected `image` to be a path"),
    "absolute path": (record("<image>", "x", image="/etc/passwd"), "outside the image root"),
    "path upwards": (record("<image>", "x", image="a/../../b.png"), "outside the image root"),
    "URL": (record("<image>", "x", image="https://example.org/a.png"), "is a URL"),
    "answers not a list": (record("Hello?", "hi", answers="hi"), "expected `answers`"),
    "half a character in an answer": (record("Hello?", "caf\ud83d"), r"turn 2: \\ud83d is half of a character"),
    "half a character in an id": (record("Hello?", "hi", id="\udc00"), r"\\udc00 is half"),
    "half a character in a picture's name": (record("<image>", "x", image="\ud83d.png"), r"\\ud83d is half"),
    "half a character in an accepted answer": (record("Hello?", "hi", answers=["\ud83d"]), r"\\ud83d is half"),
    "source not text": (record("Hello?", "hi", source=3), "expected `source` to be text"),
    "not a record": (["Hello?"], "expected a record"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record_is_named_by_file_and_row(name, root):
    data, message = BAD_RECORDS[name]
    with pytest.raises(UserError, match=f"data.json: row 7.*{message}"):
        read(data, root)


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00.png", "\x1b[31m.png", "a\nb.png"])
def test_a_picture_name_that_no_file_can_have_is_refused_in_words_that_can_be_printed(name, root):
    with pytest.raises(ImageError, match="row 7: no image file") as refusal:
        read(record("<image>", "x", image=name), root)
    said = str(refusal.value)
    said.encode("utf-8")
    assert len(said) < 1000
    assert "\x1b" not in said
    assert "\x00" not in said


def test_a_huge_id_does_not_fill_the_message(root):
    with pytest.raises(UserError) as refusal:
        read(record("Hello?", id="i" * 100_000), root)
    assert len(str(refusal.value)) < 500


def test_missing_picture_is_named_by_row_and_file(root):
    with pytest.raises(ImageError, match=r"row 7: no image file .*purple.png"):
        read(record("<image>", "x", image="purple.png"), root)


def test_missing_picture_passes_when_files_are_not_checked(root):
    data = record("<image>", "x", image="purple.png")
    assert read(data, root, check_files=False).images == (root / "purple.png",)


def test_path_outside_the_root_passes_when_allowed(root):
    data = record("<image>", "x", image=str(root / "red.png"))
    assert read(data, Path("/nowhere"), allow_outside_root=True).images == (root / "red.png",)


def messages(*turns, **keys):
    """A record of (role, content) turns, or of turns as they are."""
    return {"messages": [turn if isinstance(turn, dict) else dict(zip(("role", "content"), turn, strict=True))
                         for turn in turns], **keys}  # fmt: skip


ASKED, ANSWERED = ("user", "Sky?"), ("assistant", "blue")


@pytest.mark.parametrize(
    "data",
    [messages(("system", "Be brief."), ASKED, ANSWERED), messages(ASKED, ANSWERED, system="Be brief."),
     messages(("system", "Be brief."), ASKED, ANSWERED, system="Be brief."),
     {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Sky?"},
                        {"from": "gpt", "value": "blue"}]}],
    ids=["turn", "key", "both alike", "llava"],
)  # fmt: skip
def test_what_the_system_says_is_the_first_turn(data, root):
    assert read(data, root).turns == (Turn("system", "Be brief."), Turn("user", "Sky?"), Turn("assistant", "blue"))


def test_an_empty_system_turn_says_nothing(root):
    assert read(messages(("system", " "), ASKED, ANSWERED), root).turns[0].role == "user"


@pytest.mark.parametrize("system", [(), (("system", "Be brief."),)], ids=["alone", "after a system turn"])
def test_an_answer_before_the_first_question_is_dropped(system, root):
    data = read(messages(*system, ("assistant", "Welcome!"), ASKED, ANSWERED), root)
    assert data.opening_dropped
    assert [turn.role for turn in data.turns] == ["system"] * len(system) + ["user", "assistant"]


@pytest.mark.parametrize("key", [{"loss": False}, {"weight": 0}])
def test_an_answer_can_be_left_out_of_the_loss(key, root):
    unlearnt = {"role": "assistant", "content": "red", **key}
    turns = read(messages(ASKED, unlearnt, ASKED, {"role": "assistant", "content": "blue", "loss": True}), root).turns
    assert [turn.supervised for turn in turns if turn.role == "assistant"] == [False, True]


def test_with_parts_for_pictures_the_mark_is_a_word_of_the_text(root):
    parts = [{"type": "image"}, {"type": "text", "text": "What does <image> mean in LLaVA?"}]
    data = read(messages(("user", parts), ANSWERED, image="red.png"), root)
    assert data.turns[0].between_pictures == ("", "What does <image> mean in LLaVA?")
    assert data.question == "What does <image> mean in LLaVA?"


BAD_TURNS = {
    "system turn in the middle": (messages(ASKED, ANSWERED, ("system", "x")), "turn 3: a system turn goes before"),
    "system turn alone": (messages(("system", "x")), "turn 1: system turn without an answer"),
    "two that differ": (messages(("system", "x"), ASKED, ANSWERED, system="y"), "a `system` key and a system turn"),
    "picture in a system turn": (messages(("system", "<image>"), ASKED, ANSWERED), "stands in a system turn"),
    "half a weight": (messages(ASKED, {"role": "assistant", "content": "x", "weight": 0.5}), "`weight` is 0.5"),
    "loss as text": (messages(ASKED, {"role": "assistant", "content": "x", "loss": "no"}), "`loss` is 'no'"),
    "loss and weight differ": (
        messages(ASKED, {"role": "assistant", "content": "x", "loss": True, "weight": 0}), "and `weight` differ"),
    "question to be learnt": (
        messages({"role": "user", "content": "x", "loss": True}, ANSWERED), "`loss` asks to learn a turn of the user"),
    "nothing learnt": (
        messages(ASKED, {"role": "assistant", "content": "x", "loss": False}), "every answer is left out of the loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TURNS)
def test_a_turn_that_cannot_be_is_named_by_row(name, root):
    data, message = BAD_TURNS[name]
    with pytest.raises(UserError, match=rf"data\.json: row 7.*{message}"):
        read(data, root)
