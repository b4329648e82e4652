"""A tiny processor, a folder of pictures, and conversations about them."""

import pytest

from mllm.data import Conversation, ConversationEncoder
from tests.tiny import tiny_image, tiny_llava


@pytest.fixture(scope="session")
def llava():
    return tiny_llava()


@pytest.fixture(scope="session")
def processor(llava):
    return llava[1]


@pytest.fixture(scope="session")
def encoder(processor):
    return ConversationEncoder(processor)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for colour in ("red", "green", "blue"):
        tiny_image(colour).save(folder / f"{colour}.png")
    data = (folder / "red.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def conversation(root):
    """Makes a conversation of questions and answers in turn."""

    def make(*texts, image=None, **keys):
        return Conversation.from_record(record(*texts, image=image, **keys), image_root=root, where="data.json: row 7")

    return make


def record(*texts, image=None, **keys):
    """A LLaVA record of questions and answers in turn."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"conversations": turns, **({} if image is None else {"image": image}), **keys}
