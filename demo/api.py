"""The model for programs: `/v1/chat/completions` and `/v1/models` as OpenAI's clients speak them, and `/health`.

A model's name is an adapter's. Pictures come as data URLs only: the server fetches nothing on anybody's behalf.
transformers' own `serve` speaks the same protocol, but loads models by name and knows neither our adapters' base cards
nor our prompts, in which nothing that somebody wrote is control.
"""

import asyncio
import base64
import binascii
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from demo.scheduler import BusyError
from demo.session import ChatSession, Message
from mllm.common.errors import UserError
from mllm.inference.generate import Record

logger = logging.getLogger(__name__)

DATA_URL = "data:image/"
LOOK = 0.5  # seconds between looks at whether the client is still there


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: str | None = None  # taken and not followed: every picture has the model's size


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False


class Completion(Strict):
    """A request. What it holds and we do not do is refused, unless it asks for what is done anyway."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    user: str | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


class _Refusal(Exception):
    """An answer that is no completion."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        headers = {"retry-after": "1"} if status == 429 else {}
        self.response = JSONResponse({"error": {"message": message, "type": kind}}, status, headers)


def build_api(
    sessions: Mapping[str, ChatSession], *, api_key: str | None = None, auth: tuple[str, str] | None = None
) -> APIRouter:
    """The routes.

    Args:
        sessions: by the name of a model; the first also answers to any name if it is the only one.
        api_key: that programs must show as bearer.
        auth: user and password of the page, which open these routes too (as Basic).
    """
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "models": list(sessions)}

    @router.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        if not _may(request, api_key, auth):
            return _refused().response
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "mllm"} for name in sessions]
        return JSONResponse({"object": "list", "data": listed})

    @router.post("/v1/chat/completions")
    async def completions(request: Request) -> Any:
        try:
            if not _may(request, api_key, auth):
                raise _refused()
            return await _complete(request, sessions)
        except _Refusal as refusal:
            return refusal.response

    return router


def _may(request: Request, api_key: str | None, auth: tuple[str, str] | None) -> bool:
    if api_key is None and auth is None:
        return True
    shown = request.headers.get("authorization", "").encode()
    allowed = [f"Bearer {api_key}".encode()] if api_key else []
    allowed += [b"Basic " + base64.b64encode(":".join(auth).encode())] if auth else []
    return sum(secrets.compare_digest(shown, one) for one in allowed) > 0  # all are compared, for an equal time


def _refused() -> _Refusal:
    return _Refusal(401, "Show the server's key as `Authorization: Bearer …`.", "authentication_error")


async def _complete(request: Request, sessions: Mapping[str, ChatSession]) -> Any:
    try:
        asked = Completion.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _Refusal(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    session = sessions.get(asked.model)
    if session is None:
        raise _Refusal(404, f"No model {asked.model!r:.80}; there are {', '.join(sessions)}.", "not_found_error")
    client = f"api {request.client.host if request.client else ''} {asked.user or ''}"
    answer = _Answer(session, asked, client)
    await answer.start(request)
    if asked.stream:
        return StreamingResponse(_events(answer, asked), media_type="text/event-stream")
    text = ""
    async for delta in answer.deltas(request):
        text += delta
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": answer.finish_reason}
    return {**answer.head("chat.completion"), "choices": [choice], "usage": answer.usage}


async def _events(answer: "_Answer", asked: Completion) -> AsyncIterator[str]:
    """Server-sent events."""
    head = answer.head("chat.completion.chunk")

    def event(delta: dict[str, str], finish: str | None = None) -> str:
        return f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        async for delta in answer.deltas():
            yield event({"content": delta})
    except _Refusal as refusal:
        yield f"data: {refusal.response.body.decode()}\n\n"
        return
    yield event({}, answer.finish_reason)
    if asked.stream_options and asked.stream_options.include_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': answer.usage})}\n\n"
    yield "data: [DONE]\n\n"


class _Answer:
    """One answer, written by a thread of its own and read here; ends when nobody reads it any more."""

    def __init__(self, session: ChatSession, asked: Completion, client: str) -> None:
        self._session, self._asked, self._client = session, asked, client
        self._stop = threading.Event()
        self._texts: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._record = Record()
        self._first: str | Exception | None = None
        self._is_stopped = False
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    @property
    def finish_reason(self) -> str:
        return "length" if self._record.is_cut and not self._is_stopped else "stop"

    @property
    def usage(self) -> dict[str, int]:
        prompt, reply = len(self._record.prompt_ids), len(self._record.reply_ids)
        return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}

    async def start(self, request: Request) -> None:
        """Begins to answer and waits for the first words, so that what goes wrong until then has a status of its own.

        Raises `_Refusal` for what cannot be asked, or not now.
        """
        try:
            self._session.places.check(self._client)
            messages = await asyncio.to_thread(_read, self._asked.messages, self._session)
        except Exception as error:
            raise _refusal(error) from error
        threading.Thread(target=self._write, args=(messages,), name="mllm-api", daemon=True).start()
        try:
            self._first = await self._next(request)
        except BaseException:
            self._stop.set()
            raise
        if isinstance(self._first, Exception):
            raise _refusal(self._first) from self._first

    async def _next(self, request: Request | None) -> str | Exception | None:
        """The next text, None at the end; what is waited for ends when the client has gone."""
        while request is None or not await request.is_disconnected():
            try:
                return await asyncio.wait_for(self._texts.get(), LOOK)
            except TimeoutError:
                continue
        return _Refusal(499, "The client has gone.")

    def _write(self, messages: list[Message]) -> None:
        asked, end = self._asked, None
        try:
            texts = self._session.reply(
                messages,
                stop=self._stop,
                client=self._client,
                max_new_tokens=asked.max_completion_tokens or asked.max_tokens or self._session.limits.new_tokens,
                temperature=asked.temperature or 0.0,
                top_p=asked.top_p or 1.0,
                seed=asked.seed,
                record=self._record,
            )
            for text in texts:
                self._tell(text)
        except Exception as error:
            end = error
        self._tell(end)

    def _tell(self, item: str | Exception | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._texts.put_nowait, item)
        except RuntimeError:  # the server has ended, and its loop with it
            self._stop.set()

    async def deltas(self, request: Request | None = None) -> AsyncIterator[str]:
        """The text piece by piece. What might begin a stop text is kept back until that is known.

        `request`: whose client is looked after; a stream ends by itself when nobody reads it.
        """
        stops, sent, text, item = self._asked.stops, 0, "", self._first
        try:
            while item is not None:
                if isinstance(item, Exception):
                    raise _refusal(item) from item
                if not self._is_stopped:
                    text = item
                    found = [place for place in map(text.find, stops) if place >= 0]
                    if found:
                        text, self._is_stopped = text[: min(found)], True
                        self._stop.set()  # the record is filled in when the writing is over
                    until = len(text) if found else len(text) - _may_begin(text, stops)
                    if until > sent:
                        yield text[sent:until]
                        sent = until
                item = await self._next(request)
            if len(text) > sent:
                yield text[sent:]
        finally:
            self._stop.set()


def _may_begin(text: str, stops: list[str]) -> int:
    """Letters at the end of the text that a stop text may begin with."""
    lengths = (n for stop in stops for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def _refusal(error: Exception) -> _Refusal:
    if isinstance(error, _Refusal):
        return error
    if isinstance(error, BusyError):
        return _Refusal(429, str(error), "rate_limit_error")
    if isinstance(error, UserError):
        return _Refusal(400, str(error))
    logger.error("The model failed while answering a program", exc_info=error)
    return _Refusal(500, "The model failed. The log of the server has the details.", "server_error")


def _read(messages: list[ChatMessage], session: ChatSession) -> list[Message]:
    """The session's messages, their pictures put into small copies. Raises UserError for what cannot be asked."""
    read = []
    for number, message in enumerate(messages):
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        if urls and message.role != "user":
            raise UserError(f"messages.{number}: only users show pictures.")
        role = "system" if message.role == "developer" else message.role
        read.append((role, text, urls))
    session.check_size([Message(role, text, tuple(urls)) for role, text, urls in read])  # before any picture is read
    if read[-1][0] != "user":
        raise UserError("The last message must be the user's.")
    return [
        Message(role, text, tuple(session.pictures.show(_bytes(url), "in the message") for url in urls))
        for role, text, urls in read
    ]


def _bytes(url: str) -> bytes:
    head, comma, data = url.partition(";base64,")
    if not (comma and head.startswith(DATA_URL)):
        raise UserError("A picture is given as `data:image/png;base64,…`; this server fetches nothing from elsewhere.")
    try:
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise UserError("A picture's data URL is not base64.") from error
