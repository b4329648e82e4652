"""A conversation with pictures, answered by one loaded model. Knows nothing of the page.

A conversation goes the way of a training sample: the same reading of pictures, the same template, the same processor.
"""

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, ProcessorMixin

from demo.pictures import MAX_PIXELS, Pictures
from demo.routing_view import routing_html
from demo.scheduler import Places
from mllm.common.errors import UserError
from mllm.common.folders import process_folder
from mllm.data.conversation import IMAGE_PLACE
from mllm.data.sources import Source
from mllm.inference.generate import CHAT, Record, stream
from mllm.mole.model import routed_modules

FOLDER = "mllm-chat"  # of a process, for uploads and small copies


@dataclass(frozen=True)
class Message:
    """What the user or the model said in one turn. Its pictures stand before its text, as in LLaVA's records."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Limits:
    """The most that anybody may ask of everybody's model; looked at before any work."""

    pictures_a_turn: int = 8
    pictures: int = 24  # of a conversation
    text_bytes: int = 100_000  # of a conversation; tokenising them takes a tenth of a second
    turns: int = 400
    pixels: int = MAX_PIXELS  # of a picture
    new_tokens: int = 4096  # of an answer


class ChatSession:
    """Answers conversations with one model. It keeps none of them: each call brings its own, so users cannot mix.

    Attributes:
        places: who answers and who waits, for the page and for programs together.
    """

    limits = Limits()

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        limits: Limits | None = None,
        places: Places | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.limits = limits or self.limits
        self.places = places or self.places

    @cached_property
    def places(self) -> Places:
        return Places()

    @cached_property
    def pictures(self) -> Pictures:
        folder = process_folder(FOLDER) / "copies"
        return Pictures(self.processor.image_processor, folder, max_pixels=self.limits.pixels)

    @property
    def has_experts(self) -> bool:
        return self.num_experts > 0

    @cached_property
    def num_experts(self) -> int:
        """Real experts of a routed layer; 0 for a model without any."""
        return next((block.config.num_experts for block in self._routed()), 0)

    @cached_property
    def num_layers(self) -> int:
        return len(self._routed())

    def _routed(self) -> list[Any]:
        return list(routed_modules(self.model)) if hasattr(self, "model") else []

    def draw(self, record: Record, messages: Sequence[Message], layer: int | None) -> str:
        """The routing of an answer to these messages as HTML, see `routing_view`."""
        images = [self.pictures.open(path, path.name) for message in messages for path in message.images]
        tokenizer = self.processor.tokenizer
        return routing_html(
            record,
            images,
            layer,
            image_token_id=self.processor.image_token_id,
            decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        )

    def check(self, question: Message, earlier: Sequence[Message] = ()) -> None:
        """Raises `UserError` for a question that the model could not be asked, in words for the person who typed it."""
        if not question.text.strip():
            raise UserError("Type a question about the picture." if question.images else "Type a question first.")
        if IMAGE_PLACE in question.text:
            raise UserError(f"{IMAGE_PLACE} marks a picture's place: attach the picture and leave the mark out.")
        self.check_size([*earlier, question])
        for path in question.images:
            self.pictures.show(path, path.name)

    def check_size(self, messages: Sequence[Message]) -> None:
        """Raises `UserError` for more pictures, words or turns than the limits allow. Reads nothing."""
        limits = self.limits
        most_of_turn = max((len(message.images) for message in messages), default=0)
        counted = (
            ("pictures in a question", most_of_turn, limits.pictures_a_turn),
            ("pictures in a conversation", sum(len(message.images) for message in messages), limits.pictures),
            ("messages in a conversation", len(messages), limits.turns),
            ("bytes of text", sum(len(m.text.encode("utf-8", "replace")) for m in messages), limits.text_bytes),
        )
        for what, number, most in counted:
            if number > most:
                raise UserError(f"{number:,} {what} are too many: at most {most:,} are taken. Shorten it.")

    def reply(
        self,
        messages: Sequence[Message],
        *,
        stop: threading.Event,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        client: str = "",
        **options: Any,
    ) -> Iterator[str]:
        """Answer the last message, yielding the whole text so far each time it grows.

        All earlier turns and pictures are seen again. The answer ends early once `stop` is set or the iterator closed;
        answers asked for at the same time wait for one another. `client` is who asks, for the queue; `options` are
        those of `stream`: top_p, seed, begun, record.

        Raises:
            BusyError: too many wait already, or the client does.
            UserError: too much is asked, a picture cannot be read, or the model cannot hold so long a conversation.
        """
        self.check_size(messages)
        text = ""
        with self.places.place(client, stop) as has_place:
            if not has_place:
                return
            images = [self.pictures.open(path, path.name) for message in messages for path in message.images]
            deltas = stream(
                self.model,
                self.processor,
                to_chat(messages),
                images=images,
                max_new_tokens=min(max_new_tokens, self.limits.new_tokens),
                stop=stop,
                temperature=temperature,
                **options,
            )
            try:
                with closing(deltas):
                    for delta in deltas:
                        text += delta
                        if text.strip() and not stop.is_set():
                            yield text.strip()
            except UserError as error:
                raise UserError(str(error).removeprefix(f"{CHAT}: ")) from error  # who chats knows no rows


def to_chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as the chat template takes them; text is laid out as in LLaVA's records.

    In parts, so that a picture's mark in the text, as a model may write it, is a word like any other.
    """
    place = [{"type": "image"}, {"type": "text", "text": "\n"}]
    return [
        {
            "role": message.role,
            "content": [*(place * len(message.images)), {"type": "text", "text": message.text.strip()}],
        }
        for message in messages
    ]


def load_examples(path: str | Path, limit: int = 6) -> list[Message]:
    """First questions of a LLaVA JSON file, or of the only one in a folder; as many sources as there are take turns.

    Raises `UserError` for a missing or malformed file, a missing picture, and a folder without exactly one JSON file.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder of examples.")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise UserError(
                f"{path}: expected one .json or .jsonl file of examples, found {found}. Name the file itself."
            )
        path = files[0]
    source = Source(path)
    rows_by_source: dict[str, list[int]] = {}
    for row, name in enumerate(source.source_of_row):
        rows_by_source.setdefault(name, []).append(row)
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*rows_by_source.values()))
    rows = [row for row in rounds if row is not None][:limit]
    return [Message("user", source[row].first_question, source[row].images) for row in rows]
