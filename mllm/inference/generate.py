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

from mllm.common.errors import UserError
from mllm.data.collate import Collator
from mllm.data.conversation import IMAGE_PLACE, Conversation, Turn
from mllm.data.special_tokens import Reply
from mllm.data.template import ConversationEncoder
from mllm.inference.peers import PeerPrompts
from mllm.mole import routing_context
from mllm.routing.context import Forward

THREAD_NAME = "mllm-generate"
CHAT = "chat"  # stands for a row in messages

# All that is kept of a checkpoint's own generation settings, in scoring and in chat. It tells what the checkpoint was
# taught, not how its maker likes replies to be chosen.
KEPT = ("eos_token_id",)
# What is in most checkpoints' settings and changes no reply here.
NO_HABITS = {
    *KEPT, "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache",
    "_from_model_config",
}  # fmt: skip


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
        # A second thread finds the modules in evaluation mode and would leave them so: the first one's list counts.
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
        special: which tokens of a reply are control.
        ends: ids of tokens that end a reply, besides the checkpoint's own.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self._encoder, self._collate = ConversationEncoder(processor), Collator(processor, side="left")
        self.special, self.ends = self._encoder.template.special, [self._encoder.stop_token_id]

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
    reply = Reply(prompts.processor.tokenizer, prompts.special.hidden(settings.eos_token_id))
    return [reply.decode(ids_S).strip() for ids_S in ids_BS[:, prompt_length:]]


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
        messages: `{"role": "system" | "user" | "assistant", "content": …}`, content a string with an `<image>` mark
            for each picture, or a list of `{"type": "image"}` and `{"type": "text", "text": …}`. No text in it is ever
            control, see `mllm.data.special_tokens`.
        images: RGB pictures, in the order of their marks.
        temperature: 0 is greedy.

    Raises:
        UserError: marks and pictures differ in number, or the conversation does not fit the model. Whatever fails in
            the thread is raised here.
    """
    encoder = ConversationEncoder(processor)
    turns = [_turn(message["role"], message["content"]) for message in messages]
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
    reply = Reply(processor.tokenizer, encoder.template.special.hidden(settings.eos_token_id))
    streamer = TextIteratorStreamer(reply, skip_prompt=True)
    abandoned = threading.Event()
    failures: list[BaseException] = []

    context = routing_context(model)
    forwards: list[Forward | None] = []

    def generate() -> None:
        try:
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
    with evaluating(model):
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


def _turn(role: str, content: str | Sequence[Mapping[str, str]]) -> Turn:
    """A message as a turn. In parts `<image>` is a word like any other."""
    if isinstance(content, str):
        return Turn(role, content)
    pieces = [""]
    for part in content:
        if part["type"] == "image":
            pieces.append("")
        else:
            pieces[-1] += part["text"]
    return Turn(role, IMAGE_PLACE.join(pieces), tuple(pieces))


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
    return WholeSettings(
        max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room - prompt_length),
        eos_token_id=sorted({*ends, *own_ends(model)}),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **sampling(temperature),
    )


def sampling(temperature: float, top_k: int = 0) -> dict[str, Any]:
    """Settings that take the most probable token at temperature 0, and else draw among the `top_k` first, 0 all.

    Raises UserError for a temperature below 0.
    """
    if temperature < 0:
        raise UserError(f"temperature is 0 or more, got {temperature}.")
    return {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}


def own_ends(model: PreTrainedModel | PeftModel) -> list[int]:
    """Ids of the tokens that end a reply by the checkpoint's own settings."""
    own = model.generation_config.eos_token_id
    return [] if own is None else own if isinstance(own, list) else [own]


def set_aside(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """What the checkpoint's own generation config says and nobody here goes by."""
    own = model.generation_config.to_diff_dict()
    return {key: value for key, value in own.items() if key not in NO_HABITS and value not in (None, False)}


class WholeSettings(GenerationConfig):
    """All there is to a generation. What it leaves open is the library's default and not the checkpoint's habit.

    `generate` fills what is None in the settings given from the model's own `generation_config`, and adds what it
    does not know. Both come through this one call of `update`; no state of the model is touched, so that generations
    at the same time are not in each other's way.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **settings: Any) -> dict:
        if defaults_only and allow_custom_entries:
            return {}
        if defaults_only and self.max_new_tokens is not None:
            settings.pop("max_length", None)  # two limits would be warned of, and the library's 20 is nobody's wish
        return super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **settings)


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
