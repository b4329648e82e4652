"""A conversation with pictures, answered by one loaded model. Knows nothing of the page.

A conversation goes the way of a training sample: the same reading of pictures, the same template, the same processor.
"""

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from mllm.common.errors import UserError
from mllm.data.conversation import IMAGE_PLACE
from mllm.data.images import ImageError, open_image, picture_side
from mllm.data.sources import Source
from mllm.inference.generate import stream


@dataclass(frozen=True)
class Message:
    """What the user or the model said in one turn. Its pictures stand before its text, as in LLaVA's records."""

    role: Literal["user", "assistant"]
    text: str
    images: tuple[Path, ...] = ()


class ChatSession:
    """Answers conversations with one model. It keeps none of them: each call brings its own, so users cannot mix."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model = model
        self.processor = processor
        self._one_at_a_time = threading.Lock()  # a model's routing state serves one generation

    def check(self, question: Message) -> None:
        """Raises `UserError` for a question that the model could not be asked, in words for the person who typed it."""
        if not question.text.strip():
            raise UserError("Type a question about the picture." if question.images else "Type a question first.")
        if IMAGE_PLACE in question.text:
            raise UserError(f"{IMAGE_PLACE} marks a picture's place: attach the picture and leave the mark out.")
        for path in question.images:
            self._open(path)

    def reply(
        self,
        messages: Sequence[Message],
        *,
        stop: threading.Event,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> Iterator[str]:
        """Answer the last message, yielding the whole text so far each time it grows.

        All earlier turns and pictures are seen again. The answer ends early once `stop` is set or the iterator closed;
        answers asked for at the same time wait for one another.

        Raises:
            UserError: a picture cannot be read, or the model cannot hold so long a conversation.
        """
        images = [self._open(path) for message in messages for path in message.images]
        text = ""
        with self._one_at_a_time:
            if stop.is_set():
                return
            deltas = stream(
                self.model,
                self.processor,
                to_chat(messages),
                images=images,
                max_new_tokens=max_new_tokens,
                stop=stop,
                temperature=temperature,
            )
            with closing(deltas):
                for delta in deltas:
                    text += delta
                    if text.strip() and not stop.is_set():
                        yield text.strip()

    def _open(self, path: Path) -> Image.Image:
        """A picture, read as training reads it."""
        try:
            return open_image(path, where="chat", at_least=picture_side(self.processor.image_processor))
        except ImageError as error:
            raise UserError(
                f"The picture {path.name} cannot be read: it is damaged, not a picture, or too large. Attach another"
                " one."
            ) from error


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
