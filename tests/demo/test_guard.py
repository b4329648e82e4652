"""What the server lets in, and what it tells browsers."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from demo.guard import Guard, Readers
from tests.tiny import tiny_image


async def echo(request):
    return PlainTextResponse(str(len(await request.body())))


def client(*routes, **options):
    app = Starlette(routes=[*routes, Route("/{path:path}", echo, methods=["GET", "POST"])])
    return TestClient(Guard(app, **options), base_url="http://127.0.0.1:7860")


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "[::1]:7860", "192.168.0.7", "chat.example"])
def test_addresses_and_the_names_that_are_served_pass(host):
    assert client(hosts={"chat.example"}).get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", ""])
def test_a_foreign_host_name_is_refused(host):
    assert client(hosts={"chat.example"}).get("/", headers={"host": host}).status_code == 400


@pytest.mark.parametrize(
    "path",
    ["monitoring", "monitoring/summary", "openapi.json", "docs", "gradio_api/openapi.json", "gradio_api/OpenAPI.json/",
     "/gradio_api/openapi.json", "gradio_api/file=http://evil.example/x", "gradio_api/proxy=http://evil.example"],
)  # fmt: skip
def test_what_nobody_needs_is_not_there(path):
    assert client().get(f"/{path}").status_code == 404


@pytest.mark.parametrize("path", ["/", "/monitoring"])
def test_every_answer_tells_browsers_to_stay_with_this_origin(path):
    headers = client().get(path).headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("chunked", [False, True], ids=["length told", "length not told"])
def test_a_body_that_is_too_large_is_refused(chunked):
    small = client(sizes={"": 1000})
    body = b"x" * 1001
    assert small.post("/", content=iter([body[:500], body[500:]]) if chunked else body).status_code == 413
    assert small.post("/", content=body[:1000]).text == "1000"


def call(guard, receive):
    """Status that a bare ASGI call ends with."""
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"127.0.0.1")]
    scope = {"type": "http", "method": "POST", "path": "/", "raw_path": b"/", "query_string": b"", "headers": headers,
             "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 80)}  # fmt: skip
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), 5))
    return next(message["status"] for message in sent if message["type"] == "http.response.start")


@pytest.mark.parametrize("options", [{"pause": 0.1}, {"patience": 0.2}], ids=["stalled", "drop by drop"])
def test_a_body_that_comes_too_slowly_is_given_up(options):
    async def receive():
        await asyncio.sleep(0.05 if "patience" in options else 3600)
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert call(Guard(Starlette(routes=[Route("/", echo, methods=["POST"])]), **options), receive) == 408


def upload(tmp_path, **kept):
    paths = []
    for name, content in kept.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)

    async def keep(request):
        await request.body()
        return JSONResponse([str(path) for path in paths])

    answer = client(Route("/gradio_api/upload", keep, methods=["POST"])).post("/gradio_api/upload", content=b"x")
    return answer, paths


def test_only_pictures_may_be_uploaded_and_others_are_removed(tmp_path):
    tiny_image().save(tmp_path / "red.png")
    picture = (tmp_path / "red.png").read_bytes()
    answer, paths = upload(tmp_path, a=picture)
    assert json.loads(answer.content) == [str(paths[0])]
    answer, paths = upload(tmp_path, a=picture, b=b"<script>alert(1)</script>")
    assert answer.status_code == 415
    assert not any(path.exists() for path in paths)


def test_more_pictures_than_a_message_holds_are_refused(tmp_path):
    tiny_image().save(tmp_path / "red.png")
    answer, _ = upload(tmp_path, **{f"{n}": (tmp_path / "red.png").read_bytes() for n in range(9)})
    assert answer.status_code == 413


def test_an_upload_that_fails_is_not_an_error_of_the_server():
    async def fail(request):
        raise TypeError("/secret/path.py")

    app = client(Route("/gradio_api/upload", fail, methods=["POST"]))
    answer = app.post("/gradio_api/upload", content=b"x")
    assert answer.status_code == 400
    assert "secret" not in answer.text


def test_readers_are_away_from_when_they_left():
    readers = Readers()
    assert readers.away("a", since=0) > 0
    readers.come("a")
    assert readers.away("a", since=0) == 0
    readers.go("a")
    assert readers.away("a", since=0) < 1
