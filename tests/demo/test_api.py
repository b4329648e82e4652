"""What programs get, as OpenAI's clients ask for it."""

import asyncio
import base64
import io
import json
import threading
import time

import pytest
from starlette.testclient import TestClient

from demo.api import build_api
from demo.scheduler import Places
from demo.serve import build_server
from demo.session import ChatSession, Limits
from tests.demo.talker import Talker
from tests.tiny import tiny_image, tiny_llava

HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
def session():
    session = ChatSession(*tiny_llava())
    session.talker = Talker(session.model, session.processor)
    return session


def client(session, **options):
    return TestClient(build_server(build_api({"tiny": session}, **options), hosts=set()), base_url="http://127.0.0.1")


def ask(server, messages=HELLO, **options):
    return server.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **options})


def picture(colour="red"):
    file = io.BytesIO()
    tiny_image(colour).save(file, "PNG")
    return linked(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")


def linked(url):
    return {"type": "image_url", "image_url": {"url": url}}


def events(answer):
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def said(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


def test_an_answer_tells_text_reason_and_tokens(session):
    answer = ask(client(session), max_tokens=12).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "red three yes red"}
    assert answer["choices"][0]["finish_reason"] == "length"
    prompt = len(session.talker.prompts[0])
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}


def test_a_stream_says_the_same_piece_by_piece_and_its_usage_if_asked(session):
    chunks = events(ask(client(session), max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 4
    assert said(chunks) == "red three yes red"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["ee y", ["never", "ee y"]])
def test_an_answer_ends_before_a_stop_text_of_which_nothing_is_said(session, stop, stream):
    answer = ask(client(session), max_tokens=40, stop=stop, stream=stream)
    text = said(events(answer)) if stream else answer.json()["choices"][0]["message"]["content"]
    assert text == "red thr"
    assert session.talker.num_tokens < 40
    assert '"finish_reason": "stop"' in answer.text.replace('":"', '": "')


def test_what_began_like_a_stop_text_and_was_none_is_said(session):
    answer = ask(client(session), max_tokens=12, stop="red!", stream=True)
    assert said(events(answer)) == "red three yes red"


def test_pictures_and_a_system_turn_reach_the_model(session):
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Which?"}, picture(), picture("blue")]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Why?"},
    ]
    assert ask(client(session), asked, max_tokens=1).status_code == 200
    assert len(session.talker.pictures[0]) == 2
    prompt = session.processor.tokenizer.decode(session.talker.prompts[0])
    assert "Be brief." in prompt
    assert prompt.index("Which?") < prompt.index("Why?")


def test_a_seed_draws_the_same_answer_again():
    server = client(ChatSession(*tiny_llava()))
    texts = [ask(server, max_tokens=8, temperature=1.0, seed=seed).json()["choices"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("messages", "options", "told"),
    [
        ([], {}, "messages"),
        (HELLO, {"n": 2}, "n: "),
        (HELLO, {"tools": []}, "tools"),
        (HELLO, {"temperature": -1}, "temperature"),
        (HELLO, {"max_tokens": 0}, "max_tokens"),
        ([{"role": "assistant", "content": "x"}], {}, "last message"),
        ([{"role": "user", "content": [linked("http://x/y.png")]}], {}, "fetches"),
        ([{"role": "user", "content": [linked("file:///etc/passwd")]}], {}, "data:"),
        ([{"role": "user", "content": [linked("data:image/png;base64,@")]}], {}, "not base64"),
        ([{"role": "user", "content": [linked("data:image/png;base64,YQ==")]}], {}, "cannot be read"),
        ([{"role": "user", "content": [picture()] * 9}], {}, "9 pictures"),
        ([{"role": "user", "content": "very long " * 400}], {}, "tokens of prompt"),
        ([{"role": "user", "content": "a " * 60_000}], {}, "bytes of text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_asked_is_refused_in_words(session, messages, options, told, stream):
    answer = ask(client(session), messages, stream=stream, **options)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


def test_another_model_is_not_there(session):
    answer = client(session).post("/v1/chat/completions", json={"model": "gpt", "messages": HELLO})
    assert answer.status_code == 404
    assert "tiny" in answer.json()["error"]["message"]


def test_a_busy_model_is_429():
    session = ChatSession(*tiny_llava(), places=Places(waiting=0))
    answer = ask(client(session))
    assert answer.status_code == 429
    assert "retry-after" in answer.headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_500_without_its_words(session, stream):
    def fail(*_):
        raise RuntimeError("/secret/path")

    session.model.register_forward_pre_hook(fail)
    answer = ask(client(session), stream=stream)
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_no_answer_is_longer_than_the_server_allows():
    session = ChatSession(*tiny_llava(), limits=Limits(new_tokens=3))
    Talker(session.model, session.processor)
    assert ask(client(session), max_tokens=50).json()["usage"]["completion_tokens"] == 3


def test_models_and_health_are_told(session):
    server = client(session)
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["tiny"]
    assert server.get("/health").json()["status"] == "ok"


BASIC = "Basic " + base64.b64encode(b"ann:word").decode()


@pytest.mark.parametrize(
    ("shown", "status"),
    [("Bearer key", 200), (BASIC, 200), ("Bearer other", 401), ("key", 401), ("Bearer é", 401), ("", 401)],
)
def test_a_key_or_the_pages_password_opens_the_routes(session, shown, status):
    server = client(session, api_key="key", auth=("ann", "word"))
    headers = {"authorization": shown.encode()}
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
    assert server.get("/v1/models", headers=headers).status_code == status
    assert server.post("/v1/chat/completions", json=body, headers=headers).status_code == status
    assert server.get("/health").status_code == 200


def test_a_password_of_the_page_alone_closes_the_routes_too(session):
    assert client(session, auth=("ann", "word")).get("/v1/models").status_code == 401


def test_programs_at_the_same_time_get_their_own_answers(session):
    places = Places(a_client=4)
    session.places = places
    server, answers = client(session), {}

    def one(number):
        asked = [{"role": "user", "content": f"Number {number}?"}]
        answers[number] = ask(server, asked, max_tokens=number).json()["usage"]["completion_tokens"]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: number for number in range(1, 5)}
    assert session.talker.most_at_once == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_client_has_gone_ends(session, stream):
    session.talker.delay = 0.02
    app = build_server(build_api({"tiny": session}), hosts=set())
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 400, "stream": stream}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
             "headers": [(b"host", b"127.0.0.1")], "http_version": "1.1", "scheme": "http", "root_path": "",
             "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1)}  # fmt: skip

    async def call():
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            while session.talker.num_tokens < 5:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        await app(scope, receive, send)

    asyncio.run(call())
    deadline = time.monotonic() + 10
    while not session.talker.is_silent() and time.monotonic() < deadline:
        pass
    assert session.talker.num_tokens < 200
