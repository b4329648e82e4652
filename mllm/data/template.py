"""Conversations to token ids and labels, through the checkpoint's own chat template.

The template is rendered with marks in the places of the answers: what stands between the marks is the prompt, what
stands at them is supervised. The text is tokenised once and labels are taken from character offsets, so there is no
second tokenisation that could disagree with the first. Words of turns never become control, see `special_tokens`.
N pictures, S tokens, H height, W width.
"""

import logging
import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.text import Text
from torch import Tensor
from transformers import ProcessorMixin

from mllm.common.errors import TooLongError, UserError
from mllm.data.conversation import IMAGE_PLACE, Conversation, Turn, check_turns
from mllm.data.images import fit_image, open_image, picture_side
from mllm.data.special_tokens import InText, SpecialTokens

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that is not supervised
# Stands for an answer while the template is rendered: private-use characters, and a number that nobody can type.
ANSWER = f"\ue004{secrets.randbelow(10**18)}\ue005"
ANSWERS_TRIED = ("red", "7", "Yes.", "(a)", "é")  # tokenizers join a blank with some of them and not with others
PROBE, SYSTEM_PROBE = "probe", "setting"
PROBE_TURNS = (Turn("user", PROBE), Turn("assistant", PROBE))


class Segment(NamedTuple):
    """A stretch of rendered text."""

    text: str
    supervised: bool


class ChatTemplate:
    """Renders turns with a processor's chat template, whose habits it finds out by rendering probes.

    Attributes:
        special: what of its text is control, and how content is kept from being it.
        closing: what ends an answer. The template's own end of turn, or the tokenizer's EOS where it has none
            (llava-hf's template, made for prompts, has none; LLaVA was trained with EOS in that place).

    Raises:
        UserError: no template, no place for pictures in it, answers not shown, or nothing that could end an answer.
    """

    def __init__(self, processor: ProcessorMixin, special_tokens_in_text: InText = "text") -> None:
        self._tokenizer = processor.tokenizer
        self._image_token: str = processor.image_token
        self._template = processor.chat_template or processor.tokenizer.chat_template
        if not self._template:
            raise UserError("The processor has no chat template: give `chat_template` to mllm.build.")
        self.special: SpecialTokens | None = None  # probes hold none
        self._find_image_form()
        self._find_answer_form()
        self._find_system_form()
        self.special = SpecialTokens(
            self._tokenizer, self._written(), image_token=self._image_token, in_text=special_tokens_in_text
        )

    def segments(self, turns: Sequence[Turn], *, where: str) -> list[Segment]:
        """The text of the turns; after a last question, up to where its answer begins.

        Pictures are single image tokens. An answer's segment holds its text and what ends it. The text is for
        `special.settle`.
        """
        answers = [turn for turn in turns if turn.role == "assistant"]
        rest, *after_answers = self._render(self._messages(turns), prompt=turns[-1].role == "user").split(ANSWER)
        if len(after_answers) != len(answers):
            raise UserError(
                f"{where}: the chat template shows {len(after_answers)} answers instead of {len(answers)}; "
                "it must show the text of every turn once."
            )
        segments = []
        for answer, after in zip(answers, after_answers, strict=True):
            question = rest.removesuffix(self._lead)
            text = self.special.typed(answer.text, answer=True)
            said = Segment(rest[len(question) :] + text + self.closing, answer.supervised)
            segments += [Segment(question, False), said]
            rest = after.removeprefix(self.closing) if after.startswith(self.closing) else after.lstrip()
        if turns[-1].role == "user":
            rest = rest.removesuffix(self._loose)
        return [*segments, Segment(rest, False)]

    def takes(self, turns: Sequence[Turn]) -> bool:
        """Whether turns up to a question can be rendered, and so can they with the answer."""
        try:
            for shape in (turns, [*turns, Turn("assistant", PROBE)]):
                self.segments(shape, where=PROBE)
        except Exception:  # a Jinja template raises anything
            return False
        return True

    def move_blank_to_answers(self) -> bool:
        """Lets a blank at the end of the generation prompt begin the answer instead, where it is one token with it.

        Returns False if there is none to move.
        """
        prompt = self._render(self._messages([Turn("user", PROBE)]), prompt=True)
        blank = prompt[len(prompt.rstrip()) :]
        if self._loose or not blank:
            return False
        self._loose, self._lead = blank, blank + self._lead
        return True

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        # enable_thinking: templates of reasoning models then open and close an empty thought before every answer.
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, add_generation_prompt=prompt, tokenize=False, enable_thinking=False
        )

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        if self._system_parts is None:
            turns = into_first_question(turns)
        return [{"role": turn.role, "content": self._content(turn)} for turn in turns]

    def _content(self, turn: Turn) -> str | list[dict[str, str]]:
        """A turn as the template wants it, with pictures in the places of the `<image>` marks if it keeps them."""
        if turn.role == "assistant":
            return [_text_part(ANSWER)] if self._takes_parts else ANSWER
        if turn.role == "system":
            return [_text_part(self._typed(turn.text))] if self._system_parts else self._typed(turn.text)
        texts = turn.between_pictures
        if not self._takes_parts:
            return self._image_token.join(map(self._typed, texts))
        if self._images_first:
            return [{"type": "image"}] * (len(texts) - 1) + [_text_part(self._typed("".join(texts).strip()))]
        if self._separates_images:
            texts = [texts[0], *(text.lstrip() for text in texts[1:])]
        parts = [part for text in texts for part in ({"type": "image"}, _text_part(self._typed(text)))][1:]
        return [part for part in parts if part["type"] == "image" or part["text"]]

    def _typed(self, text: str) -> str:
        return text if self.special is None else self.special.typed(text)

    def _find_image_form(self) -> None:
        """Content as parts or as one string; whether pictures are moved to the front, or set apart by the template."""
        image = {"type": "image"}
        front = self._try([image, _text_part(PROBE)])
        self._takes_parts = front is not None
        if front is None:
            if self._try(f"{self._image_token}\n{PROBE}") is None:
                raise UserError(
                    f"The chat template has no place for pictures: {self._image_token} is not in its output."
                )
            return
        back = self._try([_text_part(PROBE), image]) or ""
        self._images_first = back.find(self._image_token) < back.find(PROBE)
        between = front[front.find(self._image_token) + len(self._image_token) : front.find(PROBE)]
        self._separates_images = between != ""

    def _try(self, content: str | list[dict[str, str]]) -> str | None:
        """The rendered probe, or None if the template fails on it or does not show its picture and its text once."""
        text = self._try_rendering([{"role": "user", "content": content}])
        return text if text and text.count(self._image_token) == 1 and text.count(PROBE) == 1 else None

    def _try_rendering(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._render(messages, prompt=True)
        except Exception:  # a Jinja template raises anything on content and roles it does not know
            return None

    def _find_answer_form(self) -> None:
        """What stands between the generation prompt and an answer (`_lead`), and what ends an answer (`closing`).

        `_loose` is what the generation prompt has at its end and a training text has not.
        """
        question, answer = Turn("user", PROBE), Turn("assistant", PROBE)
        messages = [{"role": turn.role, "content": self._content(turn)} for turn in (question, answer)]
        prompt = self._render(messages[:1], prompt=True)
        before, found, after = self._render(messages).partition(ANSWER)
        kept = prompt if before.startswith(prompt) else prompt.rstrip()
        lead = before.removeprefix(kept)
        if not found or not before.startswith(kept) or (kept != prompt and lead.strip()):
            raise UserError(
                "The chat template's generation prompt is not how a turn of the assistant begins, so that training and "
                f"generation would differ: {prompt[-60:]!r} against {before[-60:]!r}. Give mllm.build another template."
            )
        self._lead, self._loose = lead, prompt.removeprefix(kept)
        special = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        special -= {self._image_token, self._tokenizer.bos_token}
        own_end = re.match(rf"\s*({'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))})", after)
        closing = own_end.group() if special and own_end else self._tokenizer.eos_token
        if not closing:
            raise UserError("Nothing ends an answer: neither the chat template nor the tokenizer has an end token.")
        self.closing: str = closing

    def _find_system_form(self) -> None:
        """Whether the template has a place for a system turn, and whether it is given as parts there.

        None: it has no place.
        """
        question = self._content(Turn("user", PROBE))
        self._system_parts: bool | None = None
        for parts in (True, False) if self._takes_parts else (False,):
            said = [_text_part(SYSTEM_PROBE)] if parts else SYSTEM_PROBE
            if has_system_place(self._try_rendering, said, question):
                self._system_parts = parts
                return

    def _written(self) -> list[str]:
        """What the template writes around turns of every kind, the words of the turns replaced by plain ones."""
        asked, answered = Turn("user", PROBE), Turn("assistant", PROBE)
        shapes = [(asked, answered, asked), (Turn("system", PROBE), asked)]
        texts = (self._try_rendering(self._messages(turns)) for turns in shapes)
        return [text.replace(ANSWER, PROBE) for text in texts if text]


Content = str | list[dict[str, str]]


def has_system_place(render: Callable[[list[dict[str, Any]]], str | None], said: Content, asked: Content) -> bool:
    """Whether a template shows a system turn (of `SYSTEM_PROBE`) before a question (of `PROBE`), and not as a turn of
    somebody else. `render` gives None for what the template does not take.
    """
    question = {"role": "user", "content": asked}
    as_system, *as_another = (
        render([{"role": role, "content": said}, question]) for role in ("system", "user", "assistant")
    )
    shown = as_system is not None and as_system.count(SYSTEM_PROBE) == as_system.count(PROBE) == 1
    return shown and as_system not in as_another


def into_first_question(turns: Sequence[Turn]) -> Sequence[Turn]:
    """For templates without a place for a system turn: it goes before the first question, on a line of its own."""
    if turns[0].role != "system":
        return turns
    system, first, *others = turns
    begin, *pieces = first.between_pictures
    return [replace(first, pieces=(f"{system.text}\n{begin}", *pieces)), *others]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


class ConversationEncoder:
    """Turns a conversation into the tensors of one sample, its pictures loaded and processed.

    Attributes:
        stop_token_id: the token that ends every answer in training; generation is to stop at it.
        image_tokens: how many stand for a picture; every picture gets the tower's size, so all have as many.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int | None = None,
        special_tokens_in_text: InText | None = None,
    ) -> None:
        """
        Args:
            processor: a LLaVA processor (tokenizer, image processor, chat template), as mllm.load gives it.
            max_length: the most tokens a sample may have, image tokens included; None: no limit.
            special_tokens_in_text: what "</s>" is in the words of a turn: "text", its characters, or "tokens", the
                token. By default as the processor's attribute of that name says, and without one "text".

        Raises:
            UserError: the tokenizer is slow (it has no offsets), or its chat template does not serve training: see
                `ChatTemplate`; or prompts are not how training texts begin.
        """
        if not processor.tokenizer.is_fast:
            raise UserError("Labels need character offsets, which only a fast tokenizer gives (tokenizer.json).")
        self.processor = processor
        self.max_length = max_length
        in_text = special_tokens_in_text or getattr(processor, "special_tokens_in_text", "text")
        self.template = ChatTemplate(processor, in_text)
        self.stop_token_id = self._find_stop_token()
        blank = blank_pixels(processor)
        self._no_pixels = torch.zeros_like(blank[:0])
        place = processor.replace_image_token({"pixel_values": blank}, image_idx=0)
        self.image_tokens = place.count(processor.image_token)
        self._told: set[str] = set()
        self._check_prompts()

    def encode(self, conversation: Conversation, images: Sequence[Image.Image] | None = None) -> dict[str, Any]:
        """A training sample; `images` are its pictures where they are open already.

        Returns:
            input_ids, labels, attention_mask: int64 `[S]`; labels are -100 but for the answers and what ends them.
            pixel_values: float32 `[N, 3, H, W]`, N = 0 without pictures.
            domain, where: the conversation's own, for statistics and messages.

        Raises:
            UserError: nothing supervised, half a character, or pictures and places differ in number; `TooLongError`
                for more than `max_length` tokens, `ImageError` for a picture that cannot be read. Each names the row.
        """
        sample = self._encode(conversation, conversation.turns, images)
        if not (sample["labels"] != IGNORED).any():
            raise UserError(f"{conversation.where}: no token is supervised; the row has no answer to learn from.")
        return sample

    def encode_prompt(self, conversation: Conversation) -> dict[str, Any]:
        """The sample up to where its last answer begins, ready for generation; keys as those of `encode`.

        A conversation that ends with a question is taken whole. Its ids are those that `encode` gives before the
        answer.
        """
        turns = conversation.turns
        return self._encode(conversation, turns[:-1] if turns[-1].role == "assistant" else turns)

    def encode_turns(self, turns: Sequence[Turn], images: Sequence[Image.Image], *, where: str) -> dict[str, Any]:
        """Turns and RGB pictures from memory to `input_ids`, `labels`, `attention_mask` and `pixel_values`.

        Turns that end with the user's are made ready for an answer. Raises UserError as `encode` does.
        """
        check_turns(turns, where)
        segments = self.template.segments(turns, where=where)
        pixel_values, segments = self._place_images(segments, images, where)
        input_ids, labels = self._tokenize(segments)
        self._check(input_ids, segments, where)
        attention_mask = torch.ones_like(input_ids)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values,
        }

    def open(self, path: str | Path | bytes, *, where: str) -> Image.Image:
        """A picture as large as it is needed. Raises ImageError as `open_image` does."""
        return open_image(path, where=where, at_least=picture_side(self.processor.image_processor))

    def measure(self, conversation: Conversation) -> int:
        """Tokens of its sample, too long or not, told without reading a picture. Raises UserError as `encode` does."""
        check_turns(conversation.turns, conversation.where)
        segments = self.template.segments(conversation.turns, where=conversation.where)
        places = sum(segment.text.count(self.processor.image_token) for segment in segments)
        return len(self._tokenize(segments)[0]) + places * (self.image_tokens - 1)

    def surely_fits(self, conversation: Conversation) -> bool:
        """Whether it has no more than `max_length` tokens even if every byte is one; told without tokenising.

        Of a tokenizer whose normaliser makes text longer it may be wrong: then the row is too long when it is encoded.
        """
        if self.max_length is None:
            return True
        text = sum(len(turn.text.encode("utf-8", "replace")) for turn in conversation.turns)
        of_conversation, of_turn = self._tokens_of_template
        template = of_conversation + len(conversation.turns) * of_turn
        return text + template + len(conversation.images) * self.image_tokens <= self.max_length

    @cached_property
    def _tokens_of_template(self) -> tuple[int, int]:
        """What the template adds to a conversation and to a turn, at most."""
        once, twice = (self.measure(Conversation("", PROBE_TURNS * times)) for times in (1, 2))
        return once, -(-(twice - once) // len(PROBE_TURNS))

    def shortened(self, conversation: Conversation) -> Conversation:
        """The conversation without its last turns, as many as need be, and without the pictures in them.

        Raises TooLongError where even the first answer does not fit.
        """
        ends = [number for number, turn in enumerate(conversation.turns, 1) if turn.role == "assistant"]
        beginnings = [_beginning(conversation, end) for end in ends]
        fitting = bisect_right(beginnings, self.max_length, key=self.measure)
        if not fitting:
            raise TooLongError(
                f"{conversation.where}: {self.measure(beginnings[0])} tokens up to the end of the first answer, more"
                f" than max_length {self.max_length}. Raise it, shorten the row or drop it."
            )
        return beginnings[fitting - 1]

    def show(self, sample: dict[str, Any]) -> Text:
        """The decoded sample for the eye: the supervised span green and underlined, image tokens as one mark."""
        ids, labels = sample["input_ids"], sample["labels"]
        is_image, supervised = ids == self.processor.image_token_id, labels != IGNORED
        text = Text()
        kinds = torch.stack([is_image, supervised])
        run_starts = [0, *(1 + (kinds[:, 1:] != kinds[:, :-1]).any(0).nonzero().flatten()).tolist()]
        for start, end in zip(run_starts, [*run_starts[1:], len(ids)], strict=True):
            if is_image[start]:
                text.append(f"[image × {end - start}]", style="cyan")
            else:
                piece = self.processor.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
                text.append(piece, style="bold green underline" if supervised[start] else "")
        ends = "supervised" if (labels == self.stop_token_id).any() else "not supervised"
        text.append(
            f"\n({len(ids)} tokens, {int(is_image.sum())} of them image; {int(supervised.sum())} supervised; "
            f"end of answer {self.template.closing.strip()!r} {ends})",
            style="dim",
        )
        return text

    def _find_stop_token(self) -> int:
        closing = self.template.closing.strip()
        ids = self.processor.tokenizer(closing, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(f"The end of an answer, {closing!r}, must be one token of the tokenizer, not {len(ids)}.")
        return ids[0]

    def _check_prompts(self) -> None:
        """That a prompt's ids are those of the training text up to where the answer begins, whatever the answer."""
        found = self._parting_prompt()
        if found is not None and self.template.move_blank_to_answers():
            found = self._parting_prompt()
        if found is not None:
            prompt, text = (self.processor.tokenizer.decode(ids[-12:]) for ids in found)
            raise UserError(
                "The chat template's generation prompt is not made of the tokens with which its training text begins: "
                f"…{prompt!r} against …{text!r}. Give mllm.build another template."
            )

    def _parting_prompt(self) -> tuple[Tensor, Tensor] | None:
        """The ids of the first prompt and training text that part, over conversations of several shapes.

        A shape that the template does not take, as several turns, is refused by row where it occurs.
        """
        asked = Turn("user", PROBE)
        before = (
            [asked],
            [asked, Turn("assistant", PROBE), asked],
            [Turn("system", SYSTEM_PROBE), asked],
            [Turn("user", f"{IMAGE_PLACE}\n{PROBE}")],
        )
        for turns in filter(self.template.takes, before):
            prompt, _ = self._tokenize(self.template.segments(turns, where=PROBE))
            for answer in ANSWERS_TRIED:
                answered = [*turns, Turn("assistant", answer)]
                ids, labels = self._tokenize(self.template.segments(answered, where=PROBE))
                if not torch.equal(ids[: len(prompt)], prompt) or labels[len(prompt)] == IGNORED:
                    return prompt, ids[: len(prompt) + 1]
        return None

    def _encode(
        self, conversation: Conversation, turns: Sequence[Turn], images: Sequence[Image.Image] | None = None
    ) -> dict[str, Any]:
        if images is None:
            images = [self.open(path, where=conversation.where) for path in conversation.images]
        self._tell_vocabulary(turns, conversation.where)
        sample = self.encode_turns(turns, images, where=conversation.where)
        return sample | {"domain": conversation.domain, "where": conversation.where}

    def _tell_vocabulary(self, turns: Sequence[Turn], where: str) -> None:
        """Says once that a question names a token such as <loc1>, which is not taken for it."""
        texts = (turn.text for turn in turns if turn.role != "assistant")
        named = set().union(*map(self.template.special.vocabulary_in, texts)) - self._told
        if named:
            logger.warning(
                "%s: %s in a question is read letter by letter, like all special tokens there. If the token is meant, "
                "set data.special_tokens_in_text: tokens.",
                where, ", ".join(sorted(named)),
            )  # fmt: skip
            self._told |= named

    def _place_images(
        self, segments: list[Segment], images: Sequence[Image.Image], where: str
    ) -> tuple[Tensor, list[Segment]]:
        """Pixels `[N, 3, H, W]`, and the segments with each image token repeated as the processor's rule says."""
        num_places = sum(segment.text.count(self.processor.image_token) for segment in segments)
        if num_places != len(images):
            raise UserError(
                f"{where}: {num_places} places for pictures in the rendered text, but {len(images)} pictures. Put "
                f"one {IMAGE_PLACE} per picture into the questions."
            )
        if not images:
            return self._no_pixels, segments
        image_processor = self.processor.image_processor
        fitted = [fit_image(image, image_processor, where=where) for image in images]
        processed = image_processor(fitted, return_tensors="pt")
        tokens = [self.processor.replace_image_token(processed, image_idx=index) for index in range(len(images))]
        texts, _ = self.processor.get_text_with_replacements([segment.text for segment in segments], tokens)
        expanded = [Segment(text, segment.supervised) for text, segment in zip(texts, segments, strict=True)]
        return processed["pixel_values"], expanded

    def _tokenize(self, segments: list[Segment]) -> tuple[Tensor, Tensor]:
        """ids and labels, int64 `[S]`; a token is supervised if it shares a character with a supervised segment."""
        special = self.template.special
        segments = [Segment(special.settle(segment.text), segment.supervised) for segment in segments]
        tokens = special.encode("".join(segment.text for segment in segments))
        starts, ends = np.array(tokens.offsets, dtype=np.int64).reshape(-1, 2).T
        length = int(np.max(np.flatnonzero(ends), initial=-1)) + 1  # without an EOS that the tokenizer adds by itself
        supervised = np.zeros(length, dtype=bool)
        start = 0
        for segment in segments:
            end = start + len(segment.text)
            if segment.supervised:
                supervised |= (starts[:length] < end) & (ends[:length] > start)
            start = end
        input_ids = np.array(tokens.ids, dtype=np.int64)[:length]
        return torch.from_numpy(input_ids), torch.from_numpy(np.where(supervised, input_ids, IGNORED))

    def _check(self, input_ids: Tensor, segments: list[Segment], where: str) -> None:
        expected = sum(segment.text.count(self.processor.image_token) for segment in segments)
        num_image = int((input_ids == self.processor.image_token_id).sum())
        if num_image != expected:
            raise UserError(
                f"{where}: {expected} image tokens were placed but the tokenizer gives {num_image}; "
                f"{self.processor.image_token} must be a special token of the tokenizer."
            )
        self.check_length(len(input_ids), num_image, where)

    def check_length(self, tokens: int, image_tokens: int, where: str) -> None:
        """Raises TooLongError for more tokens than `max_length`."""
        if self.max_length is not None and tokens > self.max_length:
            raise TooLongError(
                f"{where}: {tokens} tokens ({image_tokens} of them image tokens), more than max_length"
                f" {self.max_length}. Raise it, shorten the row or drop it."
            )


def _beginning(conversation: Conversation, end: int) -> Conversation:
    """Its first turns, and the pictures in them."""
    turns = conversation.turns[:end]
    num_images = sum(turn.text.count(IMAGE_PLACE) for turn in turns)
    return replace(conversation, turns=turns, images=conversation.images[:num_images])


def blank_pixels(processor: ProcessorMixin) -> Tensor:
    """One picture of zeros, as the image processor shapes it: float32 `[1, 3, H, W]`. Zero is the mean colour."""
    size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
    side = size["height"] if "height" in size else size["shortest_edge"]
    blank = Image.new("RGB", (side, size.get("width", side)))
    return torch.zeros_like(processor.image_processor([blank], return_tensors="pt")["pixel_values"])
