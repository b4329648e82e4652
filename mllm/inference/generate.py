"""Answers from a model: to a whole question set in batches, or to one chat message piece by piece.

Both go the way of a training sample, so a model is asked exactly as it was taught; a peer that is no LLaVA is asked by
its own processor. B batch, S sequence.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from mllm.routing.context import Forward, RoutingContext

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


@dataclass
class Record:
    """What `stream` tells of a reply besides its text: T tokens of prompt and reply, L routed layers, X experts.

    Attributes:
        keeps_routing: whether the routing of every token is to be kept; costs a copy of it.
        prompt_ids, reply_ids: the tokens; what was begun already counts as reply.
        is_cut: whether the reply ended for want of room, and not by itself or by `stop`.
        seconds: from the start of the generation.
        layers: names of the routed layers, in the order they run.
        router_probs_LTX, picks_LTX: fp32 on the CPU, see `Routing`; of all tokens but the last one, which no forward
            has read. None for models without routers, and where nobody asked.
    """

    keeps_routing: bool = False
    prompt_ids: list[int] = field(default_factory=list)
    reply_ids: list[int] = field(default_factory=list)
    is_cut: bool = False
    seconds: float = 0.0
    layers: list[str] = field(default_factory=list)
    num_experts: int = 0
    router_probs_LTX: Tensor | None = None
    picks_LTX: Tensor | None = None

    def forget_routing(self) -> None:
        """Lets the memory of the routing go; everything else stays."""
        self.router_probs_LTX = self.picks_LTX = None


def stream(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    messages: Sequence[Mapping[str, Any]],
    *,
    images: Sequence[Image.Image] = (),
    max_new_tokens: int = 256,
    stop: threading.Event,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    begun: Sequence[int] = (),
    without: Sequence[int] = (),
    record: Record | None = None,
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
        top_p: in sampling, the share of probability that the tokens drawn from hold together.
        seed: makes sampling repeatable; none draws anew each time.
        begun: tokens of the reply that were written before; it goes on from there, and they are yielded too.
        without: numbers of experts that no token is to take, prompt included; see `RoutingContext.bar`.
        record: is filled in when the reply is over.

    Raises:
        UserError: marks and pictures differ in number, or the conversation does not fit the model. Whatever fails in
            the thread is raised here.
    """
    encoder = ConversationEncoder(processor)
    turns = [_turn(message["role"], message["content"]) for message in messages]
    sample = encoder.encode_turns(turns, images, where=CHAT)
    prompt_length = len(sample["input_ids"])
    input_ids = torch.cat([sample["input_ids"], sample["input_ids"].new_tensor(list(begun))])
    prompt = {"input_ids": input_ids[None], "attention_mask": torch.ones_like(input_ids)[None]}
    if images:
        prompt["pixel_values"] = sample["pixel_values"]
    settings = _settings(
        model,
        processor.tokenizer,
        [encoder.stop_token_id],
        prompt_length=len(input_ids),
        where=CHAT,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    reply = Reply(processor.tokenizer, encoder.template.special.hidden(settings.eos_token_id))
    streamer = _ReplyStreamer(reply, prompt_length)
    abandoned = threading.Event()
    failures: list[BaseException] = []

    context = routing_context(model)
    forwards: list[Forward | None] = []
    if without and context is None:
        raise UserError("The model has no experts that could be left out.")
    routings = _Routings(context) if record is not None and record.keeps_routing and context is not None else None
    watchers = [_StopWhenSet(stop, abandoned), *([routings] if routings is not None else [])]

    def generate() -> None:
        started = time.monotonic()
        try:
            if context is not None:
                context.bar(without)
            with _seeded(seed, model.device):
                ids = model.generate(
                    **_inputs(model, prompt), generation_config=settings, streamer=streamer, stopping_criteria=watchers
                )[0].tolist()
            if record is not None:
                record.prompt_ids, record.reply_ids = ids[:prompt_length], ids[prompt_length:]
                is_full = len(ids) - len(input_ids) == settings.max_new_tokens
                record.is_cut = is_full and ids[-1] not in settings.eos_token_id and not stop.is_set()
                record.seconds = time.monotonic() - started
            if routings is not None:
                routings.fill(record)
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
    top_p: float = 1.0,
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
        **sampling(temperature, top_p=top_p),
    )


def sampling(temperature: float, top_k: int = 0, top_p: float = 1.0) -> dict[str, Any]:
    """Settings that take the most probable token at temperature 0, and else draw among the `top_k` first, 0 all, and
    among the first that hold `top_p` of the probability together.

    Raises UserError for a temperature below 0, or a `top_p` that is no share.
    """
    if not temperature >= 0:
        raise UserError(f"temperature is 0 or more, got {temperature}.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is above 0 and at most 1, got {top_p}.")
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}


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


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """While this lasts torch draws by `seed`; afterwards as if nothing had been drawn. None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _ReplyStreamer(TextIteratorStreamer):
    """Leaves the prompt out and not what was begun of the reply, which `generate` hands over in one piece."""

    def __init__(self, reply: Reply, prompt_length: int) -> None:
        super().__init__(reply)
        self._skip = prompt_length

    def put(self, value: Tensor) -> None:
        value, self._skip = value.flatten()[self._skip :], 0
        if len(value):
            super().put(value)


class _Routings(StoppingCriteria):
    """Keeps the routing of every token of a generation of one row; looks after each of its forwards."""

    def __init__(self, context: RoutingContext) -> None:
        self._context = context
        self._probs: list[Tensor] = []
        self._picks: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self._context.routings:
            self._probs.append(self._context.stack("router_probs_TX").float().cpu())
            self._picks.append(self._context.stack("picks_TX").float().cpu())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def fill(self, record: Record) -> None:
        if self._probs:
            record.layers = self._context.layers
            record.num_experts = next(iter(self._context.routings.values())).num_experts
            record.router_probs_LTX, record.picks_LTX = torch.cat(self._probs, 1), torch.cat(self._picks, 1)


class _StopWhenSet(StoppingCriteria):
    def __init__(self, *events: threading.Event) -> None:
        self.events = events

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        stop = any(event.is_set() for event in self.events)
        return torch.full((len(input_ids),), stop, device=input_ids.device)
