"""The page's own logic, without a browser."""

import json
import os
import re
import urllib.request
from types import SimpleNamespace

import gradio as gr
import pytest

from demo import app as page
from demo.__main__ import _default_model, main
from demo.app import build_app, launch
from demo.guard import Readers
from demo.scheduler import Places
from demo.session import ChatSession, Message
from mllm.common.errors import UserError
from tests.demo.talker import Talker
from tests.tiny import tiny_image, tiny_llava, write_tiny_llava


class Scripted(ChatSession):
    """A session that says given texts, then fails if it is to."""

    def __init__(self, *texts, error=None):
        self.texts, self.error = texts, error

    def reply(self, messages, **_):
        yield from self.texts
        if self.error:
            raise self.error


def question(text="What?", *pictures):
    files = [{"type": "file", "file": {"path": str(path)}} for path in pictures]
    return {"role": "user", "content": [*files, {"type": "text", "text": text}]}


def of(*turns):
    return page.Visit(turns)


def visit(number):
    return of(*(page.Turn() for _ in range(number)))


def steps(session):
    return page.Steps({"tiny": session}, Readers())


def answer(session, history):
    pieces = list(steps(session).answer(history, visit(1), 0, 0.0, 8))
    assert pieces.pop() == (gr.skip(),) * 5  # Gradio sends the last piece again when the answer is complete
    return pieces


def test_an_error_before_any_text_puts_the_question_back_into_the_box():
    ((history, box, notice, *_),) = answer(Scripted(error=UserError("too long")), [question("What?", "a.png")])
    assert history == []
    assert box["value"] == {"text": "What?", "files": ["a.png"]}
    assert "too long" in notice["value"]
    assert notice["visible"]


def test_an_unexpected_failure_keeps_the_text_and_tells_nothing_of_the_error():
    *_, (_, box, notice, *_) = answer(Scripted("two", "two cells", error=RuntimeError("<lost>")), [question()])
    assert box["interactive"]
    assert "The model failed" in notice["value"]
    assert "lost" not in notice["value"]


def test_an_empty_answer_is_said_to_be_empty():
    ((_, _, notice, *_),) = answer(Scripted(), [question()])
    assert "empty answer" in notice["value"]


def under_way():
    """A turn whose answer has begun, and what is still to come of it."""
    turn = page.Turn()
    pieces = steps(Scripted("two", "two cells")).answer([question()], of(turn), 0, 0.0, 8)
    next(pieces)
    return turn, pieces


def test_stop_under_way_leaves_the_page_to_the_answer_which_keeps_its_text():
    turn, pieces = under_way()
    assert page._stop([question()], of(turn)) == (gr.skip(), gr.skip())
    *_, (history, box, notice, *_), _ = pieces
    assert history == gr.skip()
    assert box["interactive"]
    assert not notice["visible"]


def test_clear_under_way_leaves_the_page_to_the_answer_which_empties_it_last():
    turn, pieces = under_way()
    assert page._clear(of(turn))[0] == gr.skip()
    *_, (history, box, *_) = pieces
    assert history == []
    assert box["interactive"]
    assert page._clear(of(turn))[0] == []  # the answer is over: nobody else would


def test_until_an_answer_has_ended_nothing_of_it_is_taken_back_or_asked_again():
    turn, pieces = under_way()
    page._stop([question()], of(turn))
    assert page._undo([question()], of(turn))[0] == gr.skip()
    assert page._retry([question()], of(turn))[4] is None
    list(pieces)
    assert page._undo([question()], of(turn))[0] == []
    assert page._retry([question()], of(turn))[4] == 1


def test_a_turn_stopped_while_it_waits_gives_its_question_back_and_never_answers():
    turns = visit(2)
    assert page._stop([question("Mine?")], of(turns[0]))[1]["value"]["text"] == "Mine?"
    assert "value" not in page._stop([], of(turns[0]))[1]  # pressed twice
    answers = steps(Scripted("two"))
    assert list(answers.answer([question("Mine?")], turns, 0, 0.0, 8)) == [(gr.skip(),) * 5]
    (history, *_), *_ = answers.answer([question("Yours?")], turns, 1, 0.0, 8)
    assert history[-1]["content"] == [{"type": "text", "text": "two"}]


def test_an_answer_that_is_cut_off_leaves_its_turn_over():
    turn, pieces = under_way()
    pieces.close()
    assert page._stop([question()], of(turn))[1]["interactive"]


def test_retry_asks_the_last_question_again_with_its_pictures():
    told = [question("First?"), {"role": "assistant", "content": "1"}, question("Next?", "a.png")]
    history, _, _, turns, asked, *_ = page._retry([*told, {"role": "assistant", "content": "2"}], visit(1))
    assert history == told
    assert len(turns) == 2
    assert turns[asked].begin()


def test_undo_takes_back_the_last_turn_alone():
    told = [question("First?"), {"role": "assistant", "content": [{"type": "text", "text": "1"}]}]
    history, box, *_ = page._undo([*told, question("Next?", "a.png"), {"role": "assistant", "content": "2"}], [])
    assert history == told
    assert box["value"] == {"text": "Next?", "files": ["a.png"]}


def test_a_refused_message_stays_in_the_box_and_makes_no_turn(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    session = ChatSession(*tiny_llava())
    history, box, notice, turns, asked, *_ = steps(session).begin([], {"text": "What?", "files": [str(bad)]}, visit(0))
    assert "bad.png" in notice["value"]
    assert asked is None
    assert turns == gr.skip()
    assert "value" not in history
    assert "value" not in box


def test_words_reach_the_page_as_they_are_and_come_back_unchanged():
    words = "  <b> &amp; <img src=x> *a* &copy;\n    x"
    told = [{"role": "user", "content": [page._text(words)]}]
    assert "<" not in told[0]["content"][0]["text"]
    assert page._messages(told)[0].text == words


def test_an_answer_that_was_cut_says_so_and_can_be_continued_with_its_very_tokens():
    session = ChatSession(*tiny_llava())
    Talker(session.model, session.processor)
    turns = visit(1)
    *_, (_, _, _, told, go_on), _ = steps(session).answer([question()], turns, 0, 0.0, 6)
    assert "Cut" in told["value"]
    assert go_on["visible"]
    _, _, _, turns, asked, *_ = page._go_on([question()], turns)
    assert turns[asked].begun == turns[0].record.reply_ids
    *_, (history, *_), _, _ = steps(session).answer([question()], turns, asked, 0.0, 6)
    assert history[-1]["content"][0]["text"] == "red three yes red"  # twelve tokens


def test_an_answer_that_nobody_reads_ends(monkeypatch):
    monkeypatch.setattr(page, "GONE", 0.2)
    session = ChatSession(*tiny_llava())
    talker = Talker(session.model, session.processor, delay=0.02)
    gone = SimpleNamespace(session_hash="x")
    list(steps(session).answer([question()], visit(1), 0, 0.0, 400, gone))
    assert talker.num_tokens < 200


def test_a_question_too_many_stays_in_the_box_and_is_told_that_the_model_is_busy():
    session = ChatSession(*tiny_llava(), places=Places(waiting=0))
    _, _, notice, _, asked, *_ = steps(session).begin([], {"text": "What?", "files": []}, visit(0))
    assert "busy" in notice["value"]
    assert asked is None


def test_nothing_of_the_page_is_reported_or_callable_from_outside():
    app = build_app(Scripted(), model="tiny")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not app.analytics_enabled
    assert {fn.api_visibility for fn in app.fns.values() if fn.fn is not None} == {"private"}


@pytest.fixture
def served(tmp_path):
    tiny_image().save(tmp_path / "red.png")
    examples = [Message("user", "What colour?", (tmp_path / "red.png",))]
    app = build_app(ChatSession(*tiny_llava()), model="tiny", adapter="runs/<x>", examples=examples)
    yield launch(app, port=None)
    app.close()


def test_the_head_names_model_and_adapter_and_the_page_offers_the_examples(served):
    with urllib.request.urlopen(served + "config") as answer:
        config = json.load(answer)
    assert "Model <code>tiny</code> · adapter <code>runs/&lt;x&gt;</code>" in json.dumps(config, ensure_ascii=False)
    assert "What colour?" in json.dumps(config)
    assert re.match(r"http://127\.0\.0\.1:\d+/$", served)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--model", "{tiny}", "--adapter", "no/such/adapter"], "no/such/adapter"),
        (["--model", "{tiny}", "--examples", "no/such.json"], "no/such.json"),
    ],
    ids=["model", "adapter", "examples"],
)
def test_a_wrong_option_ends_the_command_with_one_clear_line(options, message, tmp_path, capsys):
    tiny = write_tiny_llava(tmp_path / "tiny")
    assert main([option.format(tiny=tiny) for option in options]) == 2
    error = capsys.readouterr().err
    assert re.search(f"^error: .*{message}", error, re.MULTILINE)
    assert "Traceback" not in error


def test_a_taken_port_is_named(served):
    port = int(served.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"port {port}.*--port"):
        launch(build_app(Scripted(), model="tiny"), port=port)


def test_the_chat_tells_what_it_does_not_follow_of_a_checkpoints_settings(tmp_path, monkeypatch, capsys):
    folder = write_tiny_llava(tmp_path)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.3, "eos_token_id": [1]}')
    monkeypatch.setattr("demo.app.launch", lambda app, **_: "here")
    monkeypatch.setattr("demo.app.build_app", lambda session, **_: SimpleNamespace(block_thread=lambda: None))
    assert main(["--model", str(folder), "--device", "cpu"]) == 0
    assert "only eos_token_id is kept, not do_sample True, temperature 0.3." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fetched", "adapter", "model"), [(True, False, "smol"), (True, True, "miniworld"), (False, False, "miniworld")]
)
def test_the_default_model_is_smol_once_fetched_and_miniworld_for_adapters(
    fetched, adapter, model, tmp_path, monkeypatch
):
    monkeypatch.setattr("mllm.bases.fetched.folder", lambda name: tmp_path)
    if fetched:
        (tmp_path / "config.json").touch()
    assert _default_model(adapter) == model


def test_top_p_seed_and_system_prompt_reach_the_model_and_count_for_later_turns_alone():
    class Noting(Scripted):
        def reply(self, messages, **options):
            self.asked = [(message.role, message.text) for message in messages], options["top_p"], options["seed"]
            yield "two"

    session, turns = Noting(), visit(2)
    list(steps(session).answer([question()], turns, 0, 0.7, 8))
    assert session.asked == ([("user", "What?")], 1.0, None)
    for name, value in {"top_p": 0.5, "seed": 7, "system": "Be brief."}.items():
        page._set(name, turns, value)
    list(steps(session).answer([question()], turns, 1, 0.7, 8))
    assert session.asked == ([("system", "Be brief."), ("user", "What?")], 0.5, 7)


def test_the_first_two_calls_of_the_page_are_asking_and_answering():
    """Who speaks to the page by numbers, as programs without our API may, finds them there."""
    app = build_app(Scripted(), model="tiny")
    assert [app.fns[number].fn.__name__ for number in (0, 1)] == ["begin", "answer"]
    assert [len(app.fns[number].inputs) for number in (0, 1)] == [3, 5]
