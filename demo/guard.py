"""The server's door: what a request must pass before Gradio or the API sees it, and what answers tell browsers.

Knows nothing of models and pages. The page is served to its own origin and embeds, loads and sends nowhere else, so
that no word of a conversation can make a browser call another host.
"""

import asyncio
import ipaddress
import json
import socket
import time
from collections import Counter
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from PIL import Image
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mllm.data.images import FORMATS

POLICY = (  # Gradio's page has scripts and styles in it, which therefore cannot be forbidden
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-src 'none'; frame-ancestors 'none'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
TOLD_BROWSERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
# What Gradio serves and nobody here needs: figures of use, descriptions, and calls on behalf of the server.
CLOSED = (
    "monitoring", "openapi.json", "docs", "redoc", "gradio_api/openapi.json", "gradio_api/monitoring",
    "gradio_api/proxy=", "gradio_api/run-history", "gradio_api/runs", "gradio_api/deep_link", "gradio_api/dev",
    "gradio_api/file=http", "gradio_api/process_recording", "gradio_api/custom_component", "gradio_api/vibe",
)  # fmt: skip
UPLOAD = "gradio_api/upload"
READING = "gradio_api/queue/data"


class Readers:
    """Which pages listen to their answers, by the hash of Gradio's sessions."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._left: dict[str, float] = {}

    def come(self, session: str) -> None:
        self._open[session] += 1

    def go(self, session: str) -> None:
        self._open -= Counter([session])
        self._left = {name: when for name, when in self._left.items() if time.monotonic() - when < 3600}
        self._left[session] = time.monotonic()

    def away(self, session: str, since: float) -> float:
        """Seconds that nobody has listened, counted from `since` at the earliest."""
        if self._open[session]:
            return 0.0
        return time.monotonic() - max(since, self._left.get(session, since))


class Guard:
    """ASGI middleware.

    Refuses hosts that are not served (DNS rebinding), what is too large or comes too slowly, uploads that are no
    pictures, and paths in `CLOSED`. Adds the headers of `TOLD_BROWSERS` to every answer.

    Args:
        hosts: names that are served, besides addresses in figures, which no foreign name can be taken for.
        sizes: most bytes of a request by the beginning of its path; "" is for all others.
        patience: seconds that a request may take to arrive, and (`pause`) between two of its pieces.
        files: pictures in one upload.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Iterable[str] = (),
        readers: Readers | None = None,
        sizes: MutableMapping[str, int] | None = None,
        patience: float = 120.0,
        pause: float = 15.0,
        files: int = 8,
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._readers = readers or Readers()
        self._sizes = sizes or {UPLOAD: 64 << 20, "v1": 64 << 20, "": 8 << 20}
        self._patience, self._pause, self._files = patience, pause, files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        path, headers = scope["path"].strip("/").lower(), Headers(scope=scope)
        answer = _Answer(send)
        if not self._serves(headers.get("host", "")):
            await answer.refuse(scope, receive, 400, "This server is not called by that host name; see --allow-host.")
        elif path.startswith(CLOSED):
            await answer.refuse(scope, receive, 404, "Not found.")
        else:
            await self._pass(path, headers, scope, receive, answer)

    async def _pass(self, path: str, headers: Headers, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        most = next(size for start, size in self._sizes.items() if path.startswith(start))
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            await answer.refuse(scope, receive, 413, f"At most {most:,} bytes are taken.")
            return
        body = _Body(receive, most, self._patience, self._pause)
        answer.body = body
        answer.holds_back = path.startswith(UPLOAD) and not path.startswith(f"{UPLOAD}_") and scope["method"] == "POST"
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        listens = path.startswith(READING)
        if listens:
            self._readers.come(session)
        try:
            await self._app(scope, body, answer)
        except Exception:
            if body.problem is None and not answer.holds_back:
                raise
        finally:
            if listens:
                self._readers.go(session)
        if body.problem is not None:
            await answer.refuse(scope, receive, *body.problem)
        elif answer.holds_back:
            problem = _upload_problem(answer.status, answer.held, self._files)
            if problem is not None:
                await answer.refuse(scope, receive, *problem)
            else:
                await answer.release()

    def _serves(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower()
        if name in {"localhost", socket.gethostname().lower(), *self._hosts}:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class _Body:
    """A request's body, which ends the request where it is too large or too slow: `problem` is status and words."""

    def __init__(self, receive: Receive, most: int, patience: float, pause: float) -> None:
        self._receive, self._most, self._pause = receive, most, pause
        self._until = time.monotonic() + patience
        self._is_whole = False
        self._size = 0
        self.problem: tuple[int, str] | None = None

    async def __call__(self) -> Message:
        if self._is_whole:
            return await self._receive()
        try:
            left = min(self._pause, self._until - time.monotonic())
            message = await asyncio.wait_for(self._receive(), max(left, 0.0))
        except TimeoutError:
            self.problem = 408, "The request came too slowly."
            return {"type": "http.disconnect"}
        self._size += len(message.get("body", b""))
        if self._size > self._most:
            self.problem = 413, f"At most {self._most:,} bytes are taken."
            return {"type": "http.disconnect"}
        self._is_whole = not message.get("more_body", False)
        return message


class _Answer:
    """What goes back, with our headers. Where it `holds_back`, it is kept until it is released or refused."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = False
        self._kept: list[Message] = []
        self.holds_back = False
        self.body: _Body | None = None
        self.status = 500

    @property
    def held(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self._kept)

    async def __call__(self, message: Message) -> None:
        if self.body is not None and self.body.problem is not None and not self._has_begun:
            return  # ours is sent instead
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in TOLD_BROWSERS.items():
                headers[name] = value
        if self.holds_back:
            self._kept.append(message)
            return
        self._has_begun = True
        await self._send(message)

    async def release(self) -> None:
        self.holds_back = False
        for message in self._kept:
            await self(message)

    async def refuse(self, scope: Scope, receive: Receive, status: int, words: str) -> None:
        if not self._has_begun:
            response = JSONResponse({"error": {"message": words, "type": "invalid_request_error"}}, status)
            response.headers.update(TOLD_BROWSERS | {"connection": "close"})
            await response(scope, receive, self._send)


def _upload_problem(status: int, body: bytes, most: int) -> tuple[int, str] | None:
    """Status and words if an upload is not taken, whose files are then gone; `body` is the list of paths kept."""
    if status != 200:
        return (status, "The upload was not taken.") if status < 500 else (400, "The upload was not understood.")
    try:
        paths = [Path(path) for path in json.loads(body)]
    except (ValueError, TypeError):
        return 400, "The upload was not understood."
    problem = None
    if len(paths) > most:
        problem = 413, f"At most {most} pictures are taken at once."
    elif not all(map(_is_picture, paths)):
        problem = 415, "Only pictures are taken."
    if problem is not None:
        for path in paths:
            path.unlink(missing_ok=True)
    return problem


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True  # it is one; whether it is too large is told where it is asked about
    except Exception:  # decoders raise anything
        return False


def middleware(**options: Any) -> list[Any]:
    """The guard as FastAPI takes it."""
    from starlette.middleware import Middleware

    return [Middleware(Guard, **options)]
