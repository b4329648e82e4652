"""Answers from a model: to a whole question set in batches, or to one chat message piece by piece.

Both go the way of a training sample, so a model is asked exactly as it was taught; a peer that is no LLaVA is asked by
its own processor. B batch, S sequence.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlavaProcessor,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StoppingCriteria,
    TextIteratorStreamer,
)

from mllm.data.collate import Collator
from mllm.data.conversation import IMAGE_PLACE, Conversation, Turn
from mllm.data.template import ConversationEncoder
from mllm.errors import UserError
from mllm.mole import routing_context
from mllm.peers import PeerPrompts
from mllm.routing.context import Forward

THREAD_NAME = "mllm-generate"
CHAT = "chat"  # stands for a row in messages


def answer(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    blank: bool = False,
    progress: bool = True,
    on_batch: Callable[[list[str]], None] | None = None,
) -> list[str]:
    """The model's greedy replies to the last question of each conversation, in the order given.

    Args:
        batch_size: questions answered at once, left-padded; those of similar length together, the longest first.
        max_new_tokens: the most tokens of a reply.
        blank: whether every picture is replaced by one of the mean colour, to see what the model knows without it.
        progress: whether to show a bar with rate and remaining time.
        on_batch: called once a batch, right after the prompts went through the model, with the domain of each row;
            at that moment `mllm.mole.routing_context(model)` holds the routing of the prompts.

    Raises:
        UserError: a prompt does not fit the model; `ImageError`: a picture cannot be read. Both name the row.
    """
    batches = plan_batches(conversations, processor, batch_size)
    answered = answer_batches(
        model, processor, conversations, batches, max_new_tokens=max_new_tokens, blank=blank, on_batch=on_batch
    )
    replies = [""] * len(conversations)
    with tqdm(total=len(conversations), unit=" questions", desc="answering", disable=not progress) as bar:
        for rows, texts in zip(batches, answered, strict=True):
            for row, text in zip(rows, texts, strict=True):
                replies[row] = text
            bar.update(len(rows))
    return replies


def answer_batches(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    batches: Iterable[Sequence[int]],
    *,
    max_new_tokens: int,
    blank: bool = False,
    on_batch: Callable[[list[str]], None] | None = None,
) -> Iterator[list[str]]:
    """The replies to each batch, one batch after the other; arguments and errors as for `answer`.

    A reply may depend in its last bits on what it is batched with, so whoever wants the same replies again asks the
    same batches.
    """
    prompts = prompts_for(processor)
    try:
        with evaluating(model):
            for rows in batches:
                asked = [conversations[row] for row in rows]
                yield _answer_batch(model, prompts, asked, max_new_tokens, blank, on_batch)
    finally:
        _tell_domains(model, None)


_EVALUATED: dict[int, tuple[list[torch.nn.Module], list[None]]] = {}  # id of a model -> what trained, who evaluates
_LOCK = threading.Lock()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts the model is in evaluation mode, without dropout and jitter; then each module as it was.

    Threads may overlap: the model is put back when the last of them is done.
    """
    with _LOCK:
        trained, users = _EVALUATED.setdefault(id(model), ([], []))
        trained += [module for module in model.modules() if module.training]
        users.append(None)
        model.eval()
    try:
        yield
    finally:
        with _LOCK:
            users.pop()
            if not users:
                del _EVALUATED[id(model)]
                for module in trained:
                    module.training = True


def _tell_domains(model: PreTrainedModel | PeftModel, domains: list[str] | None) -> None:
    """For routers that go by the domain, which is known of questions and of nothing else."""
    context = routing_context(model)
    if context is not None:
        context.set_domains(domains)


def plan_batches(conversations: Sequence[Conversation], processor: ProcessorMixin, batch_size: int) -> list[list[int]]:
    """Row numbers in batches by falling prompt length, so that a batch too large for memory fails at once and not at
    the end.

    As if every picture took the same number of tokens: counting pictures and the text's tokens spares reading files.
    """

    def length(row: int) -> tuple[int, int]:
        text = " ".join(turn.text for turn in conversations[row].turns)
        return len(conversations[row].images), len(processor.tokenizer(text)["input_ids"])

    order = sorted(range(len(conversations)), key=length, reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Prompts:
    """Questions as a LLaVA reads them: the way of a training sample, up to where the answer begins.

    Attributes:
        processor: whose they are.
        ends: ids of tokens that end a reply, besides the checkpoint's own.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self._encoder, self._collate = ConversationEncoder(processor), Collator(processor, side="left")
        self.ends = [self._encoder.stop_token_id]

    def __call__(self, conversations: Sequence[Conversation], *, blank: bool = False) -> Mapping[str, Tensor]:
        """What the model reads, left-padded: `input_ids` and `attention_mask` `[B, S]`, and pixels.

        `blank` empties every picture. Raises UserError or `ImageError`, naming the row.
        """
        batch = self._collate([self._encoder.encode_prompt(conversation) for conversation in conversations])
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        return inputs | ({"pixel_values": torch.zeros_like(batch["pixel_values"])} if blank else {})


def prompts_for(processor: ProcessorMixin) -> Prompts | PeerPrompts:
    """Our way of asking for a LLaVA, the model's own for any other."""
    return Prompts(processor) if isinstance(processor, LlavaProcessor) else PeerPrompts(processor)


def _answer_batch(
    model: PreTrainedModel | PeftModel,
    prompts: Prompts | PeerPrompts,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    blank: bool,
    on_batch: Callable[[list[str]], None] | None,
) -> list[str]:
    inputs = prompts(conversations, blank=blank)
    domains = [conversation.domain for conversation in conversations]
    prompt_length = inputs["input_ids"].shape[1]
    longest = conversations[int(inputs["attention_mask"].sum(1).argmax())]
    settings = _settings(
        model,
        prompts.processor.tokenizer,
        prompts.ends,
        prompt_length=prompt_length,
        where=longest.where,
        max_new_tokens=max_new_tokens,
    )
    _tell_domains(model, domains)
    after_prefill = [_AfterPrefill(lambda: on_batch(domains))] if on_batch else []
    ids_BS = model.generate(**_inputs(model, inputs), generation_config=settings, logits_processor=after_prefill)
    texts = prompts.processor.batch_decode(ids_BS[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def stream(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    messages: Sequence[Mapping[str, Any]],
    *,
    images: Sequence[Image.Image] = (),
    max_new_tokens: int = 256,
    stop: threading.Event,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Yields the reply to a chat in pieces as it is written.

    The generation runs in a thread of its own and ends with this iterator: when `stop` is set, when the iterator is
    closed, or when the reply is complete. Afterwards the thread is gone, the model is in the mode it was in, and
    `mllm.routing_context(model)` holds the routing of the last token.

    Args:
        messages: `{"role": "user" | "assistant", "content": …}`, content a string with an `<image>` mark for each
            picture, or a list of `{"type": "image"}` and `{"type": "text", "text": …}`.
        images: RGB pictures, in the order of their marks.
        temperature: 0 is greedy.

    Raises:
        UserError: marks and pictures differ in number, or the conversation does not fit the model. Whatever fails in
            the thread is raised here.
    """
    encoder = ConversationEncoder(processor)
    turns = [Turn(message["role"], _text_of(message["content"])) for message in messages]
    sample = encoder.encode_turns(turns, images, where=CHAT)
    prompt = {key: sample[key][None] for key in ("input_ids", "attention_mask")}
    if images:
        prompt["pixel_values"] = sample["pixel_values"]
    settings = _settings(
        model,
        processor.tokenizer,
        [encoder.stop_token_id],
        prompt_length=prompt["input_ids"].shape[1],
        where=CHAT,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    abandoned = threading.Event()
    failures: list[BaseException] = []

    context = routing_context(model)
    forwards: list[Forward | None] = []

    def generate() -> None:
        try:
            with evaluating(model):
                model.generate(
                    **_inputs(model, prompt),
                    generation_config=settings,
                    streamer=streamer,
                    stopping_criteria=[_StopWhenSet(stop, abandoned)],
                )
            if context is not None:
                forwards.append(context.forward)
        except BaseException as error:  # handed to the reader, who would otherwise wait for ever
            failures.append(error)
            streamer.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=generate, name=THREAD_NAME, daemon=True)
    thread.start()
    try:
        yield from filter(None, streamer)
    finally:
        abandoned.set()
        thread.join()
        for forward in forwards:
            context.adopt(forward)
    if failures:
        raise failures[0]


def _text_of(content: str | Sequence[Mapping[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(IMAGE_PLACE if part["type"] == "image" else part["text"] for part in content)


def _inputs(model: PreTrainedModel | PeftModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the model's device; pixels in its precision, ids and masks as they are."""
    moved = {key: values.to(model.device) for key, values in batch.items()}
    return {key: values.to(model.dtype) if values.is_floating_point() else values for key, values in moved.items()}


def _settings(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    *,
    prompt_length: int,
    where: str,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> GenerationConfig:
    """Plain greedy decoding or sampling, whatever habits the checkpoint's own generation config has.

    A reply ends at the token that ended answers in training, or at the checkpoint's own, or where the room ends.
    """
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and prompt_length >= room:
        raise UserError(
            f"{where}: {prompt_length} tokens of prompt, but the model holds {room}, the reply included. Shorten it."
        )
    own = model.generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else own
    return GenerationConfig(
        max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room - prompt_length),
        min_new_tokens=0,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature > 0 else 50,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=sorted({*ends, *own}),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


class _AfterPrefill(LogitsProcessor):
    """Calls back once, between the pass over the prompts and that of the first new token."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.call:
            self.call()
            self.call = None
        return scores


class _StopWhenSet(StoppingCriteria):
    def __init__(self, *events: threading.Event) -> None:
        self.events = events

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        stop = any(event.is_set() for event in self.events)
        return torch.full((len(input_ids),), stop, device=input_ids.device)
