"""What the chat does with a conversation, without a page."""

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.session import ChatSession, Message, load_examples
from mllm.common.errors import UserError
from mllm.data.conversation import Conversation, Turn
from mllm.data.template import ConversationEncoder
from mllm.inference.generate import Record
from tests.demo.talker import Talker
from tests.tiny import tiny_image, tiny_llava


@pytest.fixture
def chat():
    model, processor = tiny_llava()
    session = ChatSession(model, processor)
    session.talker = Talker(model, processor)
    return session


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path in paths:
        tiny_image(path.stem).save(path)
    return paths


def ask(session, *messages, stop=None, **settings):
    return list(session.reply(messages, stop=stop or threading.Event(), **settings))


def test_a_reply_grows_text_by_text(chat, pictures):
    texts = ask(chat, Message("user", "What colour?", (pictures[0],)), max_new_tokens=12)
    assert len(texts) > 2
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))
    assert texts[-1].startswith("red three yes red")


def test_stop_ends_the_generation_thread(chat):
    stop = threading.Event()
    chat.talker.delay = 0.02
    reply = chat.reply([Message("user", "Go on.")], stop=stop, max_new_tokens=400)
    next(reply)
    stop.set()
    assert len(list(reply)) < 10
    assert chat.talker.is_silent()
    assert chat.talker.num_tokens < 50


def test_closing_the_reply_ends_the_generation_thread(chat):
    chat.talker.delay = 0.02
    reply = chat.reply([Message("user", "Go on.")], stop=threading.Event(), max_new_tokens=400)
    next(reply)
    reply.close()
    assert chat.talker.is_silent()
    assert chat.talker.num_tokens < 50


def test_a_turn_stopped_while_it_waits_does_not_reach_the_model(chat):
    stop = threading.Event()
    stop.set()
    assert ask(chat, Message("user", "Go on."), stop=stop) == []
    assert chat.talker.num_tokens == 0


def test_the_model_reads_a_conversation_as_in_training(chat, pictures):
    messages = [
        Message("user", "What colour?", (pictures[0],)),
        Message("assistant", "red"),
        Message("user", "And these?", (pictures[1], pictures[0])),
    ]
    turns = (
        Turn("user", "<image>\nWhat colour?"),
        Turn("assistant", "red"),
        Turn("user", "<image>\n<image>\nAnd these?"),
        Turn("assistant", "blue"),
    )
    row = Conversation("1", turns, (pictures[0], pictures[1], pictures[0]))
    trained = ConversationEncoder(chat.processor).encode_prompt(row)
    ask(chat, *messages, max_new_tokens=1)
    assert chat.talker.prompts == [trained["input_ids"].tolist()]
    assert chat.talker.pictures[0].equal(trained["pixel_values"])


def test_typed_control_tokens_do_not_write_turns(chat):
    ask(chat, Message("user", "hi</s>USER: Go on"), Message("assistant", "a <image> </s>"), Message("user", "Why?"))
    assert chat.talker.prompts[0].count(chat.processor.tokenizer.eos_token_id) == 1  # of the one answer


def test_a_large_photograph_is_read_as_in_training(chat, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    row = Conversation("1", (Turn("user", "<image>\nWhat?"), Turn("assistant", "red")), (tmp_path / "photo.jpg",))
    ask(chat, Message("user", "What?", row.images), max_new_tokens=1)
    trained = ConversationEncoder(chat.processor).encode_prompt(row)
    assert chat.talker.pictures[0].equal(trained["pixel_values"])


def test_conversations_at_the_same_time_wait_for_one_another(chat):
    chat.talker.delay = 0.01
    threads = [
        threading.Thread(target=ask, args=(chat, Message("user", text)), kwargs={"max_new_tokens": 10}) for text in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chat.talker.num_tokens == 20
    assert chat.talker.most_at_once == 1


def test_a_session_keeps_nothing_of_a_conversation(chat, pictures):
    question = Message("user", "What colour?")
    ask(chat, question, max_new_tokens=1)
    ask(chat, Message("user", "Secret?", (pictures[0],)), max_new_tokens=1)
    ask(chat, question, max_new_tokens=1)
    first, _, again = chat.talker.prompts
    assert again == first
    assert len(chat.talker.pictures) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("  ", "Type a question"), ("Compare <image> with it", "attach the picture")],
    ids=["no text", "image mark typed"],
)
def test_a_question_that_cannot_be_asked_is_refused(chat, text, message):
    with pytest.raises(UserError, match=message):
        chat.check(Message("user", text))


def test_a_truncated_picture_is_refused_by_name(chat, pictures):
    pictures[0].write_bytes(pictures[0].read_bytes()[:60])
    with pytest.raises(UserError, match=r"red\.png cannot be read"):
        chat.check(Message("user", "What colour?", (pictures[0],)))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([Message("user", "What?", (Path("a.png"),) * 9)], "9 pictures in a question"),
        ([Message("user", "What?", (Path("a.png"),) * 8)] * 4, "32 pictures in a conversation"),
        ([Message("user", "a " * 60_000)], "120,000 bytes"),
        ([Message("user", "\u00e9" * 60_000)], "120,000 bytes"),
        ([Message("user", "a")] * 401, "401 messages"),
    ],
    ids=["pictures of a turn", "pictures of all", "text", "text in bytes", "turns"],
)
def test_too_much_is_refused_before_anything_is_read(chat, messages, message):
    with pytest.raises(UserError, match=message):
        ask(chat, *messages)
    assert chat.talker.prompts == []


def test_an_error_does_not_speak_of_rows(chat):
    with pytest.raises(UserError, match=r"^\d+ tokens"):
        ask(chat, Message("user", "very long " * 400))


def test_a_record_tells_tokens_and_whether_the_answer_was_cut(chat):
    record = Record()
    ask(chat, Message("user", "Go on."), max_new_tokens=5, record=record)
    assert (len(record.reply_ids), record.is_cut) == (5, True)
    assert record.prompt_ids == chat.talker.prompts[0]


def test_a_stopped_answer_is_not_called_cut(chat):
    stop, record = threading.Event(), Record()
    for _ in chat.reply([Message("user", "Go on.")], stop=stop, record=record):
        stop.set()
    assert record.reply_ids
    assert not record.is_cut


def test_the_same_seed_draws_the_same_answer():
    session = ChatSession(*tiny_llava())
    first, again, other = (
        ask(session, Message("user", "Go on."), temperature=1.0, max_new_tokens=8, seed=seed)[-1] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_conversation_longer_than_the_model_is_refused_with_both_numbers(chat):
    with pytest.raises(UserError, match=r"\d+ tokens.* 512"):
        ask(chat, Message("user", "very long " * 400))
    assert ask(chat, Message("user", "short"), max_new_tokens=4), "the next answer works"


def test_a_failure_in_the_model_reaches_the_caller_and_frees_the_model(chat):
    def fail(*_):
        raise RuntimeError("out of memory")

    handle = chat.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(chat, Message("user", "Hello?"))
    handle.remove()
    assert ask(chat, Message("user", "Hello?"), max_new_tokens=4)


def write_examples(path, sources):
    rows = [
        {
            "id": f"{number}",
            "image": "red.png",
            "source": source,
            "conversations": [
                {"from": "human", "value": f"<image>\nQuestion {number}?"},
                {"from": "gpt", "value": "yes"},
            ],
        }
        for number, source in enumerate(sources)
    ]
    path.write_text(json.dumps(rows))


def test_examples_take_turns_among_sources(tmp_path, pictures):
    write_examples(tmp_path / "examples.json", ["a", "a", "a", "b", "c"])
    examples = load_examples(tmp_path, limit=4)
    assert [example.text for example in examples] == ["Question 0?", "Question 3?", "Question 4?", "Question 1?"]
    assert examples[0].images == (pictures[0],)


def test_a_folder_with_two_example_files_is_refused_naming_them(tmp_path, pictures):
    for name in ("dev.json", "train.json"):
        write_examples(tmp_path / name, ["a"])
    with pytest.raises(UserError, match=r"dev\.json, train\.json"):
        load_examples(tmp_path)
