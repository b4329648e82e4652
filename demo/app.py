"""The chat page: layout and events only. What a turn means is in session.py; this is the one file that knows Gradio.

A turn runs in two steps. `_begin` is not queued: it shows the user's message at once and notes the Turn, so that Stop
also works while it waits for the model. `_answer` is queued, one at a time, and streams the text.
Stop and Clear only tell the Turn, and an answer under way ends itself and then readies or empties the page: all changes
come from one stream, in order. (Gradio's own `cancels` lets its client fail on the cancelled event, now and then: the
page then shows an error and loses what comes next.)
The conversation lives in the user's own page (the Chatbot's value), its Turns in a per-user `gr.State`:
no conversation is kept on the server, hence none can reach another user.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from demo.session import ChatSession, Message
from mllm.common.errors import UserError

logger = logging.getLogger(__name__)

SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")

# `Share` on a picture would upload it to a public site; the Chatbot has no option that leaves it out.
CSS = """
.gradio-container { width: 100% !important; max-width: 920px !important; margin: 0 auto !important; }
#header h1 { font-size: 1.15rem; font-weight: 600; margin: 0; }
#header p { margin: .1rem 0 0; color: var(--body-text-color-subdued); font-size: .875rem; overflow-wrap: anywhere; }
#header code { font-size: .8125rem; }
#chat .message img { max-height: 220px; width: auto; max-width: 100%; }
#chat .example-content { flex-direction: row; align-items: center; gap: .75rem; }
#chat .example-image-container, #chat .example-image { width: 96px; height: 72px; flex: none; object-fit: cover; }
#chat .message-buttons:has([aria-label="Share"]), #chat [aria-label="Share"] { display: none; }
#notice { color: var(--error-text-color); background: var(--error-background-fill); padding: .5rem .75rem;
          border: 1px solid var(--error-border-color); border-radius: var(--radius-md); overflow-wrap: anywhere; }
"""

History = list[dict[str, Any]]  # Gradio's messages: role, and content as a list of text and file parts


def build_app(
    session: ChatSession, *, model: str, adapter: str | None = None, examples: Sequence[Message] = ()
) -> gr.Blocks:
    """Lay out the page for one loaded model. `model` and `adapter` are the names that its head shows;
    `examples` appear while the conversation is empty, and a click puts one into the text box.
    """
    with gr.Blocks(title="mllm chat", analytics_enabled=False, fill_height=True, delete_cache=(3600, 86400)) as app:
        gr.HTML(_header(model, adapter), elem_id="header", padding=False)
        chatbot = gr.Chatbot(
            show_label=False,
            elem_id="chat",
            scale=1,
            height=320,  # at least; it grows to fill the window
            layout="bubble",
            buttons=["copy"],
            feedback_options=None,
            allow_tags=False,
            allow_file_downloads=False,
            placeholder="Add a picture, then ask about it.",
            examples=[_as_example(example) for example in examples] or None,
        )
        notice = gr.HTML(visible=False, padding=False)
        box = gr.MultimodalTextbox(
            show_label=False,
            elem_id="box",
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            placeholder="Ask a question …",
            max_lines=8,
            autofocus=True,
        )
        with gr.Accordion("Settings", open=False, elem_id="settings"), gr.Row():
            temperature = gr.Slider(0.0, 1.5, value=0.0, step=0.05, label="Temperature (0: the likeliest token)")
            max_new_tokens = gr.Slider(1, 1024, value=256, step=1, label="Longest answer, in tokens")
        turns = gr.State([])
        asked = gr.Number(
            visible=False, precision=0
        )  # which turn: a State is read when a step starts, this when it queues

        unqueued = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        model_step = {
            "fn": partial(_answer, session),
            "inputs": [chatbot, turns, asked, temperature, max_new_tokens],
            "outputs": [chatbot, box, notice],
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "trigger_mode": "multiple",  # a turn that was stopped while it waited still stands in the queue
            "show_progress": "minimal",
            "show_progress_on": [chatbot],
            "api_visibility": "private",
        }
        parts = [chatbot, box, notice]
        turn = [*parts, turns, asked]
        box.submit(partial(_begin, session), [chatbot, box, turns], turn, **unqueued).then(**model_step)
        chatbot.retry(_retry, [chatbot, turns], turn, **unqueued).then(**model_step)
        box.stop(_stop, [chatbot, turns], [chatbot, box], **unqueued)
        chatbot.clear(_clear, [turns], parts, **unqueued)
        chatbot.undo(_undo, [chatbot, turns], parts, **unqueued)
        chatbot.example_select(_fill_in, None, [box], **unqueued)
    return app


def launch(app: gr.Blocks, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> str:
    """Serve the page in the background and return its address; `port=None` takes a free one from 7860 on.

    Raises `UserError` when the port is taken. `share` asks Gradio for a public tunnel, which needs the internet.
    """
    try:
        _, local_url, share_url = app.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONO_FONTS),
            css=CSS,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            quiet=True,
            max_file_size="32mb",
        )
    except OSError as error:
        raise UserError(
            f"Cannot serve on {host} port {port or '7860-7959'}: {error} Give another one with --port."
        ) from error
    return share_url or local_url


# One turn


class Turn:
    """A question, from asking to the end of its answer. Stop and Clear reach it from other threads than the answer's.

    Attributes: `stop`, which ends the generation; `is_cleared`, whether the answer's end is to empty the page.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.is_cleared = False
        self.phase: Literal["waiting", "answering", "over"] = "waiting"
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Whether an answer is still wanted; it must `finish` then."""
        with self._lock:
            if self.phase == "waiting":
                self.phase = "answering"
            return self.phase == "answering"

    def end(self, *, clear: bool = False) -> str:
        """Stop it. Returns the phase it was in: where that is "answering", the answer itself sees to the page."""
        with self._lock:
            phase = self.phase
            self.stop.set()
            if phase == "waiting":
                self.phase = "over"
            self.is_cleared |= clear and phase == "answering"
            return phase

    def finish(self) -> None:
        """From now on Stop and Clear see to the page themselves."""
        with self._lock:
            self.phase = "over"


def _begin(session: ChatSession, history: History, typed: dict[str, Any], turns: list[Turn]) -> tuple:
    """Show the user's message and note its turn, or say why it cannot be sent and leave it in the box."""
    content = [{"path": path} for path in typed["files"]] + ([typed["text"]] if typed["text"].strip() else [])
    message = {"role": "user", "content": content}
    try:
        session.check(Message("user", typed["text"], tuple(Path(path) for path in typed["files"])))
    except UserError as error:
        return gr.skip(), gr.skip(), _notice(str(error)), gr.skip(), None
    return [*history, message], _busy_box(), _notice(None), [*turns, Turn()], len(turns)


def _answer(
    session: ChatSession,
    history: History,
    turns: list[Turn],
    asked: int | None,
    temperature: float,
    max_new_tokens: int,
) -> Iterator[tuple]:
    """Stream the answer into the page. If an error leaves none, the question goes back into the box."""
    unchanged = gr.skip(), gr.skip(), gr.skip()
    if asked is None or not turns[asked].begin():  # refused, or stopped while it waited
        yield unchanged
        return
    turn = turns[asked]
    try:
        yield from _pieces(session, history, turn.stop, temperature=temperature, max_new_tokens=int(max_new_tokens))
    finally:
        turn.finish()
    # The page takes the last piece twice; after it somebody may have emptied the page.
    yield _empty_page() if turn.is_cleared else unchanged


def _pieces(session: ChatSession, history: History, stop: threading.Event, **options: Any) -> Iterator[tuple]:
    text, problem = "", None
    try:
        with closing(session.reply(_messages(history), stop=stop, **options)) as reply:
            for text in reply:
                yield [*history, {"role": "assistant", "content": text}], gr.skip(), gr.skip()
        if not text and not stop.is_set():
            problem = "The model gave an empty answer."
    except UserError as error:
        problem = str(error)
    except Exception as error:  # the page must stay usable: out of memory, a lost device
        logger.exception("The model failed while answering")
        problem = f"The model failed ({type(error).__name__}: {error}). The log has the details."
    if text:
        yield gr.skip(), _ready_box(), _notice(problem)
    else:
        yield *_withdraw(history), _notice(problem)


def _retry(history: History, turns: list[Turn]) -> tuple:
    if _is_answering(turns):
        return gr.skip(), gr.skip(), gr.skip(), gr.skip(), None
    history = history[: _last_question(history) + 1]
    return history, _busy_box(), _notice(None), [*turns, Turn()], len(turns)


def _undo(history: History, turns: list[Turn]) -> tuple:
    return (gr.skip(), gr.skip(), gr.skip()) if _is_answering(turns) else (*_withdraw(history), _notice(None))


def _is_answering(turns: list[Turn]) -> bool:
    """Whether an answer is still to end, though the page may offer to take it back."""
    return bool(turns) and turns[-1].phase == "answering"


def _stop(history: History, turns: list[Turn]) -> tuple:
    """End the answer where it is. If it had not begun, the question goes back into the box."""
    phase = turns[-1].end()
    if phase == "waiting":
        return _withdraw(history)
    return gr.skip(), gr.skip() if phase == "answering" else gr.update(
        interactive=True, submit_btn=True, stop_btn=False
    )


def _clear(turns: list[Turn]) -> tuple:
    is_answering = bool(turns) and turns[-1].end(clear=True) == "answering"
    return (gr.skip(), gr.skip(), gr.skip()) if is_answering else _empty_page()


def _fill_in(example: gr.SelectData) -> dict[str, Any]:
    return {"text": example.value["text"], "files": [file["path"] for file in example.value.get("files", [])]}


# Between the page's form of a conversation and the session's


def _messages(history: History) -> list[Message]:
    return [
        Message(
            role=message["role"],
            text="\n".join(part["text"] for part in message["content"] if part["type"] == "text"),
            images=tuple(Path(part["file"]["path"]) for part in message["content"] if part["type"] == "file"),
        )
        for message in history
    ]


def _last_question(history: History) -> int:
    return max(index for index, message in enumerate(history) if message["role"] == "user")


def _withdraw(history: History) -> tuple[History, dict]:
    """The conversation before its last question, and the text box holding that question again."""
    last = _last_question(history)
    question = _messages(history[last : last + 1])[0]
    return history[:last], _ready_box(text=question.text, files=[str(path) for path in question.images])


def _as_example(message: Message) -> dict[str, Any]:
    return {"text": message.text, "files": [str(path) for path in message.images]}


# Parts of the page


def _header(model: str, adapter: str | None) -> str:
    adapter_part = f"adapter <code>{escape(adapter)}</code>" if adapter else "no adapter"
    return f"<h1>Chat with pictures</h1><p>Model <code>{escape(model)}</code> · {adapter_part}</p>"


def _busy_box() -> dict:
    return gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True)


def _empty_page() -> tuple:
    return [], _ready_box(), _notice(None)


def _ready_box(text: str = "", files: list[str] | None = None) -> dict:
    return gr.update(value={"text": text, "files": files or []}, interactive=True, submit_btn=True, stop_btn=False)


def _notice(problem: str | None) -> dict:
    text = f'<div id="notice" role="alert">{escape(problem)}</div>' if problem else ""
    return gr.update(value=text, visible=bool(problem))
