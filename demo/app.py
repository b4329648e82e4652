"""The chat page: layout and events only. What a turn means is in session.py; this is the one file that knows Gradio.

A turn runs in two steps. `begin` is not queued: it shows the user's message at once and notes the Turn, so that Stop
also works while it waits for the model. `answer` waits for a place (`scheduler`) and streams the text.
Stop and Clear only tell the Turn, and an answer under way ends itself and then readies or empties the page: all changes
come from one stream, in order. (Gradio's own `cancels` lets its client fail on the cancelled event, now and then: the
page then shows an error and loses what comes next.)
The conversation lives in the user's own page (the Chatbot's value), its Turns in a per-user `gr.State`:
no conversation is kept on the server, hence none can reach another user.
Words are shown letter by letter: nothing in them is Markdown, HTML or a formula, so none of them can load or link.
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from html import escape, unescape
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import gradio as gr
from fastapi import APIRouter

from demo import routing_view
from demo.guard import Readers, middleware
from demo.session import FOLDER, ChatSession, Message
from mllm.common.errors import UserError
from mllm.common.folders import process_folder
from mllm.inference.generate import Record

logger = logging.getLogger(__name__)

SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")
BASE = "base"
COMPARED = 3  # adapters side by side
GONE = 8.0  # seconds without anybody listening, after which an answer ends

# Dark enough for words in grey: 4.5:1 and more on every background of the page.
GREY = {
    "body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300",
    "input_placeholder_color": "*neutral_600", "input_placeholder_color_dark": "*neutral_300",
    "block_label_text_color": "*neutral_600", "block_label_text_color_dark": "*neutral_200",
    "block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300",
}  # fmt: skip

# Pictures may be dropped anywhere: the browser would else open them in place of the page. The box is readied for typing
# on wide screens only, since a phone would scroll to it.
HEAD = """<script>
addEventListener("dragover", event => event.preventDefault());
addEventListener("drop", event => {
  event.preventDefault();
  if (event.target.closest && event.target.closest("#box")) return;
  const chooser = document.querySelector("#box input[type=file]");
  const pictures = [...event.dataTransfer.files].filter(file => file.type.startsWith("image/"));
  if (!chooser || !pictures.length) return;
  const dropped = new DataTransfer();
  pictures.forEach(picture => dropped.items.add(picture));
  chooser.files = dropped.files;
  chooser.dispatchEvent(new Event("change", {bubbles: true}));
});
if (navigator.clipboard) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  const entities = {"&lt;": "<", "&gt;": ">", "&amp;": "&"};  // as `_text` writes them
  navigator.clipboard.writeText = text => write(text.replace(/&(lt|gt|amp);/g, found => entities[found]));
}
</script>"""
# The Chatbot opens at its end, also where that is the last of its examples.
OPENED = """() => {
  if (innerWidth > 600) document.querySelector("#box textarea")?.focus({preventScroll: true});
  setTimeout(() => document.querySelectorAll("#chat *").forEach(part => { part.scrollTop = 0; }), 300);
}"""

# `Share` on a picture would upload it to a public site; the Chatbot has no option that leaves it out.
CSS = """
.gradio-container { width: 100% !important; max-width: 920px !important; margin: 0 auto !important; }
#header h1 { font-size: 1.15rem; font-weight: 600; margin: 0; }
#header p { margin: .1rem 0 0; color: var(--body-text-color-subdued); font-size: .875rem; overflow-wrap: anywhere; }
#header code { font-size: .8125rem; }
.gradio-container:has(#view) { max-width: 1400px !important; }
#sides, #talk { flex-grow: 1; }
#sides { align-items: stretch; }
#chat .message { overflow-wrap: anywhere; }
#chat .message .chatbot { white-space: pre-wrap; }
#chat .message img { max-height: 220px; width: auto; max-width: 100%; object-fit: contain; }
#chat .example-content { flex-direction: row; align-items: center; gap: .75rem; }
#chat .example-image-container, #chat .example-image { width: 96px; height: 72px; flex: none; object-fit: contain; }
#chat .message-buttons:has([aria-label="Share"]), #chat [aria-label="Share"] { display: none; }
#box img { object-fit: contain !important; }
#compared { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: .75rem; }
#compared .said { white-space: pre-wrap; overflow-wrap: anywhere; }
#told { color: var(--body-text-color-subdued); font-size: .8125rem; }
#notice { color: var(--error-text-color); background: var(--error-background-fill); padding: .5rem .75rem;
          border: 1px solid var(--error-border-color); border-radius: var(--radius-md); overflow-wrap: anywhere; }
"""

History = list[dict[str, Any]]  # Gradio's messages: role, and content as a list of text and file parts


def build_app(
    session: ChatSession,
    *,
    model: str,
    adapter: str | None = None,
    examples: Sequence[Message] = (),
    others: Mapping[str, ChatSession] | None = None,
) -> gr.Blocks:
    """Lay out the page for one loaded model. `model` and `adapter` are the names that its head shows;
    `examples` appear while the conversation is empty, and a click asks one.
    `others`: more adapters by name, to switch to and to compare with; the base is one of them.
    """
    # Gradio reads it while it makes components, and leaves what it finds in it behind; this folder goes with us.
    os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = str(process_folder(FOLDER))
    readers = Readers()
    sessions = {adapter or BASE: session, **(others or {})}
    steps = Steps(sessions, readers)
    most_experts, most_layers = (max(getattr(s, n) for s in sessions.values()) for n in ("num_experts", "num_layers"))
    with gr.Blocks(title="mllm chat", analytics_enabled=False, fill_height=True, delete_cache=(3600, 86400)) as app:
        gr.HTML(_header(model, list(sessions) if others else adapter), elem_id="header", padding=False)
        with gr.Row(visible=bool(others)):
            names = list(sessions)
            which = gr.Radio(names, value=names[0], label="Answers come from", elem_id="adapter", scale=3)
            compare = gr.Button("Compare on the last question", elem_id="compare", size="sm", scale=1)
        shows = gr.Checkbox(
            False, label="Show what the experts do", elem_id="experts", container=False, visible=most_experts > 0
        )
        with gr.Row(elem_id="sides", equal_height=False):
            with gr.Column(scale=3, min_width=320, elem_id="talk"):
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
                    render_markdown=False,
                    latex_delimiters=[],
                    placeholder="A model that answers questions about pictures. Add one and ask, or click an example.",
                    examples=[_as_example(example) for example in examples] or None,
                )
                told = gr.HTML(visible=False, padding=False, elem_id="told")
                go_on = gr.Button("Continue", visible=False, size="sm", elem_id="continue")
                notice = gr.HTML(visible=False, padding=False)
                compared = gr.HTML(visible=False, padding=False)
                box = gr.MultimodalTextbox(
                    show_label=False,
                    elem_id="box",
                    sources=["upload"],
                    file_types=["image"],
                    file_count="multiple",
                    placeholder="Ask a question …",
                    max_lines=8,
                )
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    with gr.Row():
                        temperature = gr.Slider(
                            0.0, 1.5, value=0.0, step=0.05, label="Temperature (0: the likeliest token)"
                        )
                        max_new_tokens = gr.Slider(1, 1024, value=256, step=1, label="Longest answer, in tokens")
                    with gr.Row():
                        top_p = gr.Slider(0.05, 1.0, value=1.0, step=0.05, label="Top-p, above temperature 0")
                        seed = gr.Number(None, precision=0, label="Seed (empty: another draw each time)")
                    system = gr.Textbox(label="System prompt", lines=2, elem_id="system")
            with gr.Column(visible=False, scale=2, min_width=320, elem_id="view") as view:
                layer = gr.Slider(
                    -1, max(0, most_layers - 1), value=-1, step=1, label="Layer (-1: all)", elem_id="layer"
                )
                with gr.Row():
                    choices = [("all experts", "all"), *_experts_left_out(most_experts)]
                    experts = gr.Dropdown(choices, value="all", label="Answer again with", elem_id="left", scale=2)
                    again = gr.Button("Answer again", elem_id="again", scale=1)
                drawn = gr.HTML(padding=False)
        turns = gr.State(Visit())
        asked = gr.Number(
            visible=False, precision=0
        )  # which turn: a State is read when a step starts, this when it queues

        unqueued = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        about = [told, go_on]
        parts = [chatbot, box, notice, *about]
        model_step = {
            "fn": steps.answer,
            "inputs": [chatbot, turns, asked, temperature, max_new_tokens],
            "outputs": parts,
            "concurrency_limit": None,  # who waits is told by session.places, for programs too
            "trigger_mode": "multiple",  # a turn that was stopped while it waited still stands in the queue
            "show_progress": "minimal",
            "show_progress_on": [chatbot],
            "api_visibility": "private",
        }
        turn = [chatbot, box, notice, turns, asked, *about]
        view_step = {"fn": steps.view, "inputs": [chatbot, turns, layer], "outputs": [drawn], **unqueued}
        for event, step, inputs in (
            (box.submit, steps.begin, [chatbot, box, turns]),
            (chatbot.retry, _retry, [chatbot, turns]),
            (go_on.click, _go_on, [chatbot, turns]),
            (again.click, _again, [chatbot, turns, experts]),
        ):
            event(step, inputs, turn, **unqueued).then(**model_step).then(**view_step)
        filled = chatbot.example_select(_fill_in, None, [box], **unqueued)
        asking = filled.then(steps.begin, [chatbot, box, turns], turn, **unqueued)
        asking.then(**model_step).then(**view_step)
        for setting, name in ((top_p, "top_p"), (seed, "seed"), (system, "system")):
            # Noted when they change, not read when a turn begins: a turn's inputs are what it needs and no more.
            setting.change(partial(_set, name), [turns, setting], None, **unqueued)
        which.change(_choose, [turns, which], [go_on], **unqueued)
        compare.click(
            steps.compare,
            [chatbot, turns, max_new_tokens],
            [compared],
            concurrency_limit=None,
            show_progress="minimal",
            api_visibility="private",
        )
        layer.change(**view_step)
        shows.change(_show, [turns, shows], [view], **unqueued).then(**view_step)
        box.stop(_stop, [chatbot, turns], [chatbot, box], **unqueued)
        chatbot.clear(_clear, [turns], parts, **unqueued)
        chatbot.undo(_undo, [chatbot, turns], parts, **unqueued)
        app.load(None, js=OPENED, api_visibility="private")
    app.readers = readers
    return app


def launch(
    app: gr.Blocks,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    allowed_hosts: Sequence[str] = (),
    auth: tuple[str, str] | None = None,
    api: APIRouter | None = None,
) -> str:
    """Serve the page in the background and return its address; `port=None` takes a free one from 7860 on.

    `allowed_hosts`: names that browsers may call the server by, besides its address, this machine's name and localhost.
    `auth`: user and password that the page asks for. `api`: routes to serve beside it, see `demo.api`.

    Raises `UserError` when the port is taken. `share` asks Gradio for a public tunnel, which needs the internet.
    """
    hosts = {host.lower(), *(name.lower() for name in allowed_hosts)}
    guarded = {"middleware": middleware(hosts=hosts, readers=app.readers)}
    undescribed = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    try:
        server, local_url, share_url = app.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=auth,
            prevent_thread_lock=True,
            theme=gr.themes.Default(
                primary_hue="blue", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONO_FONTS
            ).set(**GREY),
            css=CSS + routing_view.CSS,
            head=HEAD,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            quiet=True,
            max_file_size="32mb",
            app_kwargs=guarded | undescribed,
        )
    except OSError as error:
        raise UserError(
            f"Cannot serve on {host} port {port or '7860-7959'}: {error} Give another one with --port."
        ) from error
    if api is not None:
        server.include_router(api)
    if share_url:
        hosts.add(urlsplit(share_url).hostname)
    return share_url or local_url


# One turn


class Turn:
    """A question, from asking to the end of its answer. Stop and Clear reach it from other threads than the answer's.

    Attributes: `stop`, which ends the generation; `is_cleared`, whether the answer's end is to empty the page;
    `begun`, tokens of the answer that it goes on from; `without`, experts that are left out; `record`, what the
    generation tells at its end.
    """

    def __init__(self, begun: Sequence[int] = (), without: Sequence[int] = ()) -> None:
        self.stop = threading.Event()
        self.begun, self.without = begun, without
        self.record = Record()
        self.session: ChatSession | None = None  # that answers it
        self.is_cleared = False
        self.phase: Literal["waiting", "answering", "over"] = "waiting"
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Whether an answer is still wanted; it must `finish` then."""
        with self._lock:
            is_wanted = self.phase == "waiting"
            if is_wanted:
                self.phase = "answering"
            return is_wanted

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


class Visit(list[Turn]):
    """One person's turns, and what that person has set.

    `shows_experts`: whether routing is to be kept and drawn; `adapter`: whose answers are wanted, None the first's;
    `top_p` and `seed` as `stream` takes them; `system`: a prompt before the conversation.
    """

    shows_experts = False
    adapter: str | None = None
    top_p = 1.0
    seed: int | None = None
    system = ""

    @property
    def drawing(self) -> dict[str, Any]:
        return {"top_p": self.top_p, "seed": self.seed}

    def said_before(self, history: History) -> list[Message]:
        """The conversation as the model is to read it."""
        return [*([Message("system", self.system)] if self.system.strip() else []), *_messages(history)]


class Steps:
    """The two steps of a turn, and what else asks a model. The first session is the one that answers unless told."""

    def __init__(self, sessions: Mapping[str, ChatSession], readers: Readers) -> None:
        self._sessions, self._readers = sessions, readers
        self._session = next(iter(sessions.values()))  # for what is the same in all: limits, queue and pictures

    def _chosen(self, turns: Visit) -> ChatSession:
        return self._sessions.get(turns.adapter, self._session)

    def begin(self, history: History, typed: dict[str, Any], turns: Visit, request: gr.Request = None) -> tuple:
        """Show the user's message and note its turn, or say why it cannot be sent and leave it in the box."""
        question = Message("user", typed["text"], tuple(Path(path) for path in typed["files"]))
        try:
            self._session.places.check(_client(request))
            self._session.check(question, _messages(history))
            # The page gets the copy, so that neither a browser nor Gradio handles the original again.
            files = [self._session.pictures.show(path, path.name) for path in question.images]
        except UserError as error:
            return gr.skip(), gr.skip(), _notice(str(error)), gr.skip(), None, gr.skip(), gr.skip()
        content = [{"path": str(path)} for path in files] + [_text(typed["text"])]
        return _ask([*history, {"role": "user", "content": content}], turns, Turn())

    def answer(
        self,
        history: History,
        turns: Visit,
        asked: int | None,
        temperature: float,
        max_new_tokens: int,
        request: gr.Request = None,
    ) -> Iterator[tuple]:
        """Stream the answer into the page. If an error leaves none, the question goes back into the box."""
        unchanged = (gr.skip(),) * 5
        # Refused, or stopped while it waited, or a number that no step of ours gave.
        if asked is None or not 0 <= asked < len(turns) or not history or not turns[asked].begin():
            yield unchanged
            return
        turn, over = turns[asked], threading.Event()
        turn.record.keeps_routing = turns.shows_experts
        for earlier in turns[:asked]:  # the view is of the last answer, and routing is large
            earlier.record.forget_routing()
        history = history[: _last_question(history) + 1]  # what was begun of an answer is told again
        options = {"temperature": temperature, "max_new_tokens": int(max_new_tokens), "client": _client(request)}
        options |= turns.drawing
        try:
            if request is not None:
                self._watch_reader(request.session_hash or "", turn.stop, over)
            turn.session = self._chosen(turns)
            yield from self._pieces(history, turns.said_before(history), turn, options)
        finally:
            over.set()
            turn.finish()
        # The page takes the last piece twice; after it somebody may have emptied the page.
        yield _empty_page() if turn.is_cleared else unchanged

    def _watch_reader(self, session_hash: str, stop: threading.Event, over: threading.Event) -> None:
        """Ends the answer of somebody who has gone, or never came for it: Gradio would write it to the end."""
        since = time.monotonic()

        def watch() -> None:
            while not over.wait(1.0):
                if self._readers.away(session_hash, since) > GONE:
                    stop.set()
                    return

        threading.Thread(target=watch, name="mllm-reader", daemon=True).start()

    def _pieces(
        self, history: History, messages: list[Message], turn: Turn, options: dict[str, Any]
    ) -> Iterator[tuple]:
        text, problem, same = "", None, gr.skip()
        try:
            asked = {"stop": turn.stop, "begun": turn.begun, "without": turn.without, "record": turn.record, **options}
            with closing(turn.session.reply(messages, **asked)) as reply:
                for text in reply:
                    yield [*history, {"role": "assistant", "content": [_text(text)]}], same, same, same, same
            if not text and not turn.stop.is_set():
                problem = "The model gave an empty answer."
        except UserError as error:
            problem = str(error)
        except Exception:  # the page must stay usable: out of memory, a lost device
            logger.exception("The model failed while answering")
            problem = "The model failed. The log of the server has the details."
        if text:
            yield same, _ready_box(), _notice(problem), *_told(turn.record)
        elif turn.begun:
            yield same, _ready_box(), _notice(problem), *_told(None)
        else:
            yield *_withdraw(history), _notice(problem), *_told(None)

    def view(self, history: History, turns: Visit, layer: int) -> Any:
        """Draw the routing of the last answer, where the view is open."""
        if not turns.shows_experts:
            return gr.skip()
        record = turns[-1].record if turns else Record()
        if record.picks_LTX is None or not history:
            return "<p>Ask something: what the experts do is recorded from now on.</p>"
        session = turns[-1].session
        layer = None if layer < 0 else min(int(layer), session.num_layers - 1)
        return session.draw(record, _messages(history), layer)

    def compare(
        self, history: History, turns: Visit, max_new_tokens: int, request: gr.Request = None
    ) -> Iterator[dict[str, Any]]:
        """Answer the last question by the adapters, side by side, each with its routing where the view is open."""
        if not history:
            yield gr.update(value="<p>Ask something first.</p>", visible=True)
            return
        messages = turns.said_before(history[: _last_question(history) + 1])
        columns = dict.fromkeys(list(self._sessions)[:COMPARED], ("…", ""))
        stop, over = threading.Event(), threading.Event()
        if request is not None:
            self._watch_reader(request.session_hash or "", stop, over)
        try:
            for name in columns:
                session, record = self._sessions[name], Record(keeps_routing=turns.shows_experts)
                asked = {"stop": stop, "record": record, "client": _client(request)}
                try:
                    for text in session.reply(messages, max_new_tokens=int(max_new_tokens), **asked):
                        columns[name] = text, ""
                        yield gr.update(value=_columns(columns), visible=True)
                except UserError as error:
                    columns[name] = str(error), ""
                except Exception:
                    logger.exception("The model failed while answering")
                    columns[name] = "The model failed. The log of the server has the details.", ""
                if record.picks_LTX is not None:
                    columns[name] = columns[name][0], session.draw(record, messages, None)
                yield gr.update(value=_columns(columns), visible=True)
        finally:
            over.set()
            stop.set()


def _client(request: gr.Request | None) -> str:
    return f"page {request.session_hash}" if request is not None else ""


def _ask(history: History, turns: Visit, turn: Turn) -> tuple:
    turns.append(turn)
    return history, _busy_box(), _notice(None), turns, len(turns) - 1, *_told(None)


def _show(turns: Visit, shows: bool) -> dict:
    """Open or close the view; what is closed is neither recorded nor drawn."""
    turns.shows_experts = shows
    return gr.update(visible=shows)


def _set(name: str, turns: Visit, value: Any) -> None:
    """Note a setting for the turns to come; a seed as torch takes it."""
    if name == "seed":
        value = None if value is None else int(value) % 2**63
    setattr(turns, name, value)


def _choose(turns: Visit, name: str) -> dict:
    """Let the next answers come from that adapter; another one's cannot be continued."""
    turns.adapter = name
    if turns:
        turns[-1].record.is_cut = False
    return gr.update(visible=False)


def _experts_left_out(number: int) -> list[tuple[str, str]]:
    """Choices of the view: what it says, and the experts that are left out."""
    others = {e: [o for o in range(number) if o != e] for e in range(number)}
    without = [(f"all but expert {e}", str(e)) for e in others]
    return [*without, *((f"only expert {e}", " ".join(map(str, left))) for e, left in others.items())] if number else []


def _again(history: History, turns: Visit, left_out: str) -> tuple:
    """Answer the last question again, by some of the experts."""
    asked = _retry(history, turns)
    if asked[4] is not None:
        turns[-1].without = [int(number) for number in left_out.split()] if left_out != "all" else []
    return asked


def _retry(history: History, turns: Visit) -> tuple:
    if _is_answering(turns) or not history:
        return gr.skip(), gr.skip(), gr.skip(), gr.skip(), None, gr.skip(), gr.skip()
    return _ask(history[: _last_question(history) + 1], turns, Turn())


def _go_on(history: History, turns: Visit) -> tuple:
    """Write on where the last answer was cut."""
    if not turns or _is_answering(turns) or not turns[-1].record.is_cut:
        return gr.skip(), gr.skip(), gr.skip(), gr.skip(), None, gr.skip(), gr.skip()
    return _ask(history, turns, Turn(begun=turns[-1].record.reply_ids))


def _undo(history: History, turns: Visit) -> tuple:
    return (gr.skip(),) * 5 if _is_answering(turns) else (*_withdraw(history), _notice(None), *_told(None))


def _is_answering(turns: Visit) -> bool:
    """Whether an answer is still to end, though the page may offer to take it back."""
    return bool(turns) and turns[-1].phase == "answering"


def _stop(history: History, turns: Visit) -> tuple:
    """End the answer where it is. If it had not begun, the question goes back into the box."""
    phase = turns[-1].end() if turns else "over"
    if phase == "waiting":
        return _withdraw(history)
    return gr.skip(), gr.skip() if phase == "answering" else gr.update(
        interactive=True, submit_btn=True, stop_btn=False
    )


def _clear(turns: Visit) -> tuple:
    is_answering = bool(turns) and turns[-1].end(clear=True) == "answering"
    return (gr.skip(),) * 5 if is_answering else _empty_page()


def _fill_in(example: gr.SelectData) -> dict[str, Any]:
    return {"text": example.value["text"], "files": [file["path"] for file in example.value.get("files", [])]}


# Between the page's form of a conversation and the session's


def _messages(history: History) -> list[Message]:
    return [
        Message(
            role=message["role"],
            text=unescape("\n".join(part["text"] for part in message["content"] if part["type"] == "text")),
            images=tuple(Path(part["file"]["path"]) for part in message["content"] if part["type"] == "file"),
        )
        for message in history
    ]


def _last_question(history: History) -> int:
    return max((index for index, message in enumerate(history) if message["role"] == "user"), default=0)


def _withdraw(history: History) -> tuple[History, dict]:
    """The conversation before its last question, and the text box holding that question again."""
    if not history:
        return history, _ready_box()
    last = _last_question(history)
    question = _messages(history[last : last + 1])[0]
    return history[:last], _ready_box(text=question.text, files=[str(path) for path in question.images])


def _as_example(message: Message) -> dict[str, Any]:
    return {"text": message.text, "files": [str(path) for path in message.images]}


# Parts of the page


def _columns(answers: Mapping[str, tuple[str, str]]) -> str:
    """Answers side by side: by name, what was said, and the routing as HTML."""
    cells = (
        f'<div data-name="{escape(name)}"><h3>{escape(name)}</h3><p class="said">{escape(text)}</p>{routing}</div>'
        for name, (text, routing) in answers.items()
    )
    return f'<div id="compared">{"".join(cells)}</div>'


def _header(model: str, adapter: str | list[str] | None) -> str:
    adapters = [adapter] if isinstance(adapter, str) else adapter or []
    word = "adapters" if len(adapters) > 1 else "adapter"
    named = ", ".join(f"<code>{escape(name)}</code>" for name in adapters)
    adapter_part = f"{word} {named}" if adapters else "no adapter"
    return f"<h1>Chat with pictures</h1><p>Model <code>{escape(model)}</code> · {adapter_part}</p>"


def _text(text: str) -> dict[str, str]:
    """Words for the Chatbot, which shows HTML whatever it is told. Of a bare string it takes the indentation away."""
    return {"type": "text", "text": escape(text, quote=False)}


def _busy_box() -> dict:
    return gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True)


def _empty_page() -> tuple:
    return [], _ready_box(), _notice(None), *_told(None)


def _ready_box(text: str = "", files: list[str] | None = None) -> dict:
    return gr.update(value={"text": text, "files": files or []}, interactive=True, submit_btn=True, stop_btn=False)


def _notice(problem: str | None) -> dict:
    text = f'<div id="notice" role="alert">{escape(problem)}</div>' if problem else ""
    return gr.update(value=text, visible=bool(problem))


def _told(record: Record | None) -> tuple[dict, dict]:
    """The line under an answer, and whether it may be continued."""
    number = len(record.reply_ids) if record else 0
    if not number:
        return gr.update(value="", visible=False), gr.update(visible=False)
    cut = "<b>Cut</b> at the longest answer's length. " if record.is_cut else ""
    speed = f", {number / record.seconds:.1f} tokens/s" if record.seconds else ""
    return gr.update(value=f"{cut}{number} tokens{speed}", visible=True), gr.update(visible=record.is_cut)
