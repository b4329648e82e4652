"""Which tokens a forward pass carries, and what every router decided about them.

B batch, S sequence, T = B·S tokens in row order, L routed layers, X experts, K picks.
One RoutingContext a model: the model's pre-forward hook takes the tokens, the layers hand in their routings, losses,
statistics and the demo read both afterwards. Tokens belong to their forward, not to the model: another thread, another
conversation or recomputation in backward meets its own.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm.common.errors import UserError
from mllm.routing.past import Entry, find_cache, find_past, keep_past, past_length
from mllm.routing.routing import Routing

UNREAD = (
    "A model with MOLE is trained, but nobody has asked for the routing losses of a forward, so its experts are "
    "not balanced as its MoleConfig says. Add mllm.RoutingObjective(model).loss() to the loss, put "
    "mllm.RoutingLossMixin before transformers' Trainer, or switch the losses off in MoleConfig (balance='none')."
)


@dataclass(eq=False)
class Tokens:
    """The tokens of one forward pass, for its routers. Holds no graph; `on` gives a copy on another device.

    Attributes:
      batch_size, sequence_length  B and S of the tokens of this call (S = 1 in a decode step with a cache)
      is_image_T  [T] bool, True where the token stands for a picture patch; None when a model with pictures was called
                  with embeddings instead of ids, so that nobody can tell
      token_ids_T [T] int64; None when the model was called with embeddings
      is_pad_T    [T] bool, True where a two-dimensional attention mask is 0; without such a mask, nowhere
      sample_T    [T] int64, the row of the batch a token belongs to
      picture_BD  [B, D] fp32, the mean embedding of each row's pictures, see `picture_TD`; None where nobody has seen
                  what enters the language model
      patches_before_B  [B] int64, picture patches of the row in earlier calls with its cache; None: none
      domains     of the rows, or of what beam search repeats; None where nobody has told them
      barred      numbers of real experts that no token is to take, see `RoutingContext.bar`
    """

    batch_size: int = 0
    sequence_length: int = 0
    is_image_T: Tensor | None = None
    token_ids_T: Tensor | None = None
    is_pad_T: Tensor | None = None
    sample_T: Tensor | None = None
    picture_BD: Tensor | None = None
    patches_before_B: Tensor | None = None
    domains: tuple[str, ...] | None = None
    barred: tuple[int, ...] = ()
    unknown_past: str = ""  # why nobody knows what the rows showed in earlier calls
    _copies: dict[torch.device, Tokens] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Tokens:
        """The same with all tensors on `device`, copied once for each."""
        home = self.sample_T if self.picture_BD is None else self.picture_BD
        if home is None or (home.device == device and self.sample_T.device == device):
            return self
        if device not in self._copies:
            tensors = {f.name: getattr(self, f.name) for f in fields(self)}
            moved = {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}
            self._copies[device] = replace(self, _copies={}, **moved)
        return self._copies[device]

    @property
    def modality_T(self) -> Tensor:
        """[T] int64, 0 for a text token and 1 for a picture patch.

        Raises UserError when nobody can tell.
        """
        if self.is_image_T is None:
            raise UserError(
                "The model was called with inputs_embeds, so image and text tokens cannot be told apart; call it with "
                "input_ids."
            )
        return self.is_image_T.long()

    @property
    def picture_TD(self) -> Tensor:
        """[T, D] fp32: for each token the mean of its row's picture embeddings, as they enter the language model; zeros
        for a row without a picture.

        With a cache the pictures of the row's earlier calls count too. So a token that stands before a picture in its
        row is told of it too; in generation it is not, where the picture came in a later call.
        Raises UserError when nobody has seen them: the language model was called by itself with embeddings, or its
        cache was filled without routers.
        """
        if self.unknown_past:
            raise UserError(self.unknown_past)
        if self.picture_BD is None:
            raise UserError(
                "A router reads the row's picture, but the language model was not called through the model that holds "
                "it, with input_ids; call the whole model, or set MoleConfig.router_reads='token'."
            )
        return self.picture_BD[self.sample_T.to(self.picture_BD.device)]

    @property
    def patch_number_T(self) -> Tensor:
        """[T] int64: of a picture patch, its number among the row's patches, from 1 on, earlier calls included."""
        if self.unknown_past:
            raise UserError(self.unknown_past)
        number_BS = self.modality_T.view(self.batch_size, -1).cumsum(1)
        if self.patches_before_B is not None:
            number_BS = number_BS + self.patches_before_B.to(number_BS.device)[:, None]
        return number_BS.flatten()

    @property
    def knows_domains(self) -> bool:
        """Whether the rows' domains have been told."""
        return bool(self.domains)

    def domain_of_row(self) -> list[str]:
        """The domain of each row. Beam search repeats rows, and their domains with them.

        Raises UserError when no domains were set, or their number does not fit the batch.
        """
        if not self.domains:
            raise UserError(
                "Routing goes by the domain, and nobody has told the rows' domains; call "
                "routing_context(model).set_domains([...]) before the forward."
            )
        repeats, rest = divmod(self.batch_size, len(self.domains))
        if rest:
            raise UserError(
                f"{len(self.domains)} domains were set for a batch of {self.batch_size} rows; give one a row."
            )
        return [domain for domain in self.domains for _ in range(repeats)]

    def domain_T(self, known: Sequence[str]) -> Tensor:
        """[T] int64, where in `known` the domain of a token's row stands. Raises UserError for one that does not."""
        unknown = sorted(set(self.domain_of_row()) - set(known))
        if unknown:
            raise UserError(
                f"No expert is meant for domain {unknown[0]!r}; MoleConfig.expert_domains are {', '.join(known)}."
            )
        return self.sample_T.new_tensor([known.index(domain) for domain in self.domain_of_row()])[self.sample_T]


class Reading:
    """Whether a forward's routing losses have been asked for, and whether a user has been told that they were not.

    Apart from the forward, because a hook in the graph holds it: the hook must not keep the graph alive.
    """

    def __init__(self, said: list[str]) -> None:
        self.is_done, self.said = False, said

    def check(self, _: Tensor) -> None:
        """Hook of the model's output: called when its backward pass begins."""
        if not self.is_done and not self.said:
            self.said.append(UNREAD)
            warnings.warn(UNREAD, stacklevel=2)


@dataclass(eq=False)
class Forward:
    """One forward pass: its tokens, and what was recorded while it ran.

    `routings`: layer name -> Routing, in the order the layers ran. `choices`: router name -> what experts chose, in
    models whose experts choose (`mllm.moma`).
    """

    tokens: Tokens
    expects_gradient: bool = False
    past: int = 0  # tokens that its cache held
    rows: dict[str, Tensor] = field(default_factory=dict)  # what the cache knew of the rows
    told: tuple[Tensor, dict[str, Tensor]] | None = None  # this call's patches [B, S], and the rows with them
    routings: dict[str, Routing] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    reading: Reading = field(default_factory=lambda: Reading([]))


class _OfThread(threading.local):
    running: Forward | None = None
    last: Forward | None = None
    recomputed: Tokens | None = None
    domains: tuple[str, ...] | None = None
    has_told: bool = False
    barred: tuple[int, ...] = ()


def of_tokens(name: str) -> property:
    """A context's attribute of that name: the tokens' own."""
    return property(lambda context: getattr(context.tokens, name), doc=f"`{name}` of the tokens, see `Tokens`.")


class RoutingContext:
    """The tokens and routings of this thread's forward pass: of the one that runs, else of the last one.

    It has the attributes of `Tokens`, and `routings`, layer name -> Routing, in the order the layers ran. A thread that
    has run no forward sees the last one of any thread.

    Recording is on only while the model's forward runs, so activation checkpointing does not record twice.
    Recomputation in backward is given the tokens of its own forward (`carry`), in whatever order and thread backward
    passes come.

    Example:
        >>> import torch, mllm, peft
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> model = peft.get_peft_model(base, mllm.MoleConfig(r=2, num_experts=3))
        >>> output = model(input_ids=torch.ones(2, 5, dtype=torch.long))
        >>> context = mllm.routing_context(model)
        >>> context.layers
        ['layers.0.mlp']
        >>> context.stack("router_probs_TX").shape
        torch.Size([1, 10, 3])
    """

    tokens_class: type[Tokens] = Tokens

    def __init__(self, image_token_id: int | None = None) -> None:
        self.image_token_id = image_token_id
        self._forget()

    def _forget(self) -> None:
        self._thread = _OfThread()
        self._newest: Forward | None = None
        self._domains: tuple[str, ...] | None = None
        self._hooks: list[Any] = []
        self._remembers = self._has_losses = False
        self._said: list[str] = []
        self.bias_counts: Any = None  # of BiasBalance: one for a model, whoever counts

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model starts without the last batch: tensors inside a graph cannot be copied.
        return {"image_token_id": self.image_token_id, "_remembers": self._remembers, "_has_losses": self._has_losses}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        self.__dict__.update(state)

    # -- where the tokens come from ------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, *, remembers: bool = False, has_losses: bool = False) -> None:
        """Follow `model`, the Hugging Face model itself: `PeftModel.generate` does not pass through
        `PeftModel.forward`.

        `remembers`: routers read pictures (`picture_TD`, `patch_number_T`), so what enters the decoder is looked at and
        the cache keeps it. `has_losses`: training without asking for the routing losses deserves a warning.
        """
        self._remembers, self._has_losses = remembers, has_losses
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]
        if remembers:
            decoder = model.get_decoder()
            self._hooks.append(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))

    def _before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.read_embeddings(kwargs.get("inputs_embeds"))

    def detach(self, model: nn.Module) -> None:
        """Stop following the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for module in model.modules():
            for name in CHECKPOINTS:
                checkpoint = module.__dict__.get(name)
                if isinstance(checkpoint, CarriesTokens) and checkpoint.context is self:
                    setattr(module, name, checkpoint.checkpoint)

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = kwargs
        if args:
            inputs = kwargs | inspect.signature(model.forward).bind_partial(*args).arguments
        self.carry(model)
        self.begin(
            input_ids=inputs.get("input_ids"),
            inputs_embeds=inputs.get("inputs_embeds"),
            attention_mask=inputs.get("attention_mask"),
            cache=inputs.get("past_key_values"),
            expects_gradient=model.training and torch.is_grad_enabled(),
        )

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        forward = self._thread.running
        self.end()
        if forward is None or output is None or in_backward():  # output None: it failed
            return
        cache = find_cache(output) if self._remembers else None
        if cache is not None and not forward.tokens.unknown_past:
            keep_past(cache, _entry(forward))
        if self._has_losses and forward.expects_gradient and forward.routings:
            _watch(output, forward.reading)

    def begin(
        self,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Any = None,
        cache: Any = None,
        picture_BD: Tensor | None = None,
        expects_gradient: bool = False,
    ) -> None:
        """Start a forward of this thread: take the tokens, drop its last routings, record from now on.

        `cache`: the model's `past_key_values`; the call goes on with its rows. `picture_BD` [B, D] tells the rows'
        pictures where the language model starts midway, so that its input does not.

        input_ids [B, S] or inputs_embeds [B, S, D] · attention_mask [B, >= S]: in a decode step with a cache it covers
        the past too, and its last S columns are this call's. Masks of any other shape say nothing about padding here.
        """
        thread = self._thread
        domains = thread.domains if thread.has_told else self._domains
        tokens = self.tokens_class(picture_BD=picture_BD, domains=domains, barred=thread.barred)
        forward = Forward(tokens, expects_gradient, reading=Reading(self._said))
        thread.running = forward
        ids = input_ids if input_ids is not None else inputs_embeds
        if ids is None:
            return
        tokens.batch_size, tokens.sequence_length = ids.shape[:2]
        num_tokens = tokens.batch_size * tokens.sequence_length
        rows = torch.arange(tokens.batch_size, device=ids.device)
        tokens.sample_T = rows.repeat_interleave(tokens.sequence_length)
        tokens.token_ids_T = None if input_ids is None else input_ids.flatten()
        nowhere_T = torch.zeros(num_tokens, dtype=torch.bool, device=ids.device)
        if self.image_token_id is None:
            tokens.is_image_T = nowhere_T
        else:
            tokens.is_image_T = None if input_ids is None else (input_ids == self.image_token_id).flatten()
        tokens.is_pad_T = nowhere_T
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            tokens.is_pad_T = (attention_mask[:, -tokens.sequence_length :] == 0).flatten().to(ids.device)
        if self._remembers:
            self._recall(forward, cache)

    def _recall(self, forward: Forward, cache: Any) -> None:
        """What the cache knows of the rows: of their patches at once, of their embeddings in `read_embeddings`."""
        tokens, forward.past = forward.tokens, past_length(cache)
        past = find_past(cache)
        if past is not None:
            forward.rows = past.before(forward.past)
        elif forward.past and tokens.picture_BD is None:
            tokens.unknown_past = (
                f"Routers read the rows' pictures, but the cache of {forward.past} tokens does not know them: it was "
                "filled without this adapter, or taken apart since. Let the model with its adapter fill a new cache."
            )
        if forward.rows and len(forward.rows["patches_B"]) != tokens.batch_size:
            raise UserError(
                f"The cache remembers the pictures of {len(forward.rows['patches_B'])} rows, but the model was called "
                f"with {tokens.batch_size}. Repeat or choose rows by the cache's own batch_repeat_interleave and "
                "batch_select_indices."
            )
        tokens.patches_before_B = forward.rows.get("patches_B")

    def read_embeddings(self, inputs_embeds: Tensor | None) -> None:
        """Take what enters the language model, [B, S, D]; None where it embeds the tokens itself: then no pictures."""
        forward = self._thread.running
        if forward is None or forward.tokens.picture_BD is not None:
            return
        tokens, rows = forward.tokens, forward.rows
        if inputs_embeds is None or tokens.is_image_T is None:
            if "embeds_BD" in rows:
                tokens.picture_BD = rows["embeds_BD"] / rows["patches_B"].clamp(min=1)[:, None]
            return
        seen = tokens.on(inputs_embeds.device)
        embeds_TD, is_patch_T = inputs_embeds.detach().flatten(0, 1).float(), seen.is_image_T & ~seen.is_pad_T
        count_B = seen.sample_T.new_zeros(tokens.batch_size).index_add(0, seen.sample_T, is_patch_T.long())
        sums_BD = embeds_TD.new_zeros(tokens.batch_size, embeds_TD.shape[-1])
        sums_BD = sums_BD.index_add(0, seen.sample_T, embeds_TD * is_patch_T[:, None])
        if rows:
            count_B, sums_BD = count_B + rows["patches_B"].to(count_B.device), sums_BD + rows["embeds_BD"].to(sums_BD)
        tokens.picture_BD = sums_BD / count_B.clamp(min=1)[:, None]
        tokens._copies.clear()
        forward.told = is_patch_T.view(tokens.batch_size, -1), {"patches_B": count_B, "embeds_BD": sums_BD}

    def set_domains(self, domains: Sequence[str] | None) -> None:
        """Tell the domain of each row of the batches to come, for routers that go by it; None forgets them.

        They hold for the forwards of this thread, and of threads that have told none. A forward keeps those that were
        told before it, in backward too.
        """
        told = None if domains is None else tuple(domains)
        self._thread.domains, self._thread.has_told = told, True
        self._domains = told

    def bar(self, experts: Sequence[int]) -> None:
        """Let no token of this thread's forwards take these real experts, to see what they do; () lets all again.

        A token that would have no expert left, null ones counted, takes them all the same.
        """
        self._thread.barred = tuple(experts)

    def end(self) -> None:
        """End the forward: what runs from now on is recomputation and is not recorded."""
        thread = self._thread
        if thread.running is not None and not in_backward():  # a recomputed model is nobody's last forward
            thread.last = self._newest = thread.running
        thread.running = None

    # -- whose tokens --------------------------------------------------------------------------------------------------

    @property
    def forward(self) -> Forward | None:
        """This thread's forward that runs, else its last one, else the last one of any thread."""
        return self._thread.running or self._thread.last or self._newest

    def adopt(self, forward: Forward | None) -> None:
        """Let another thread's forward count as this thread's last one, for who has waited for that thread."""
        if forward is not None:
            self._thread.last = forward

    @property
    def is_recording(self) -> bool:
        """Whether a forward of this thread runs."""
        return self._thread.running is not None

    @property
    def tokens(self) -> Tokens:
        """The tokens of `forward`; in recomputation those of its own forward.

        Under a checkpoint that could not be told them, asking for anything of them raises UserError.
        """
        thread = self._thread
        if thread.recomputed is not None:
            return thread.recomputed
        if thread.running is None and in_backward():
            return UnknownTokens()
        return self.tokens_class() if self.forward is None else self.forward.tokens

    def carry(self, model: nn.Module) -> None:
        """Let the model's activation checkpointing recompute each forward with that forward's own tokens.

        Called before every forward: checkpointing may be switched on at any time.
        """
        if not torch.is_grad_enabled():
            return
        for module in model.modules():
            for name in CHECKPOINTS:
                checkpoint = module.__dict__.get(name)
                if checkpoint is not None and not _carries(checkpoint, self):
                    setattr(module, name, CarriesTokens(self, checkpoint))

    @contextmanager
    def recomputing(self, tokens: Tokens) -> Iterator[None]:
        """While this lasts, this thread's layers see `tokens`."""
        thread = self._thread
        before, thread.recomputed = thread.recomputed, tokens
        try:
            yield
        finally:
            thread.recomputed = before

    batch_size, sequence_length = of_tokens("batch_size"), of_tokens("sequence_length")
    is_image_T, token_ids_T = of_tokens("is_image_T"), of_tokens("token_ids_T")
    is_pad_T, sample_T = of_tokens("is_pad_T"), of_tokens("sample_T")
    picture_BD, picture_TD = of_tokens("picture_BD"), of_tokens("picture_TD")
    modality_T, patch_number_T = of_tokens("modality_T"), of_tokens("patch_number_T")
    knows_domains, domain_of_row, domain_T = (of_tokens(n) for n in ("knows_domains", "domain_of_row", "domain_T"))

    def on(self, device: torch.device) -> Tokens:
        """The tokens with all tensors on the device of the layer that asks."""
        return self.tokens.on(device)

    # -- where the routings go -----------------------------------------------------------------------------------------

    @property
    def routings(self) -> dict[str, Routing]:
        """Layer name -> Routing of `forward`, in the order the layers ran."""
        return {} if self.forward is None else self.forward.routings

    def record(self, layer: str, routing: Routing, *, trainable: bool) -> None:
        """Keep `routing` under the layer's name, unless this is recomputation.

        Raises UserError when a trainable router's record carries no gradient in training: re-entrant activation
        checkpointing runs the forward without a graph, and every routing loss would silently do nothing.
        """
        forward = self._thread.running
        if forward is None:
            return
        if forward.expects_gradient and trainable and not routing.router_probs_TX.requires_grad:
            raise UserError(
                f"The routing of {layer} carries no gradient although the model is training. This is what re-entrant "
                "activation checkpointing does, and under it routing losses would silently do nothing. Use the "
                "non-reentrant kind: use_reentrant=False."
            )
        tokens = forward.tokens
        if tokens.sample_T is not None and len(routing.expert_ids_TK) != len(tokens.sample_T):
            raise UserError(
                f"{layer} routed {len(routing.expert_ids_TK)} tokens, but the model was called with "
                f"{tokens.batch_size} x {tokens.sequence_length}: inside a model that drops or adds positions nobody "
                "can tell which token is which. Such a model is not supported."
            )
        forward.routings[layer] = routing

    # -- what readers ask for ------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """Names of the routed layers, in running order."""
        return list(self.routings)

    def stack(self, column: str | Callable[[Routing], Tensor]) -> Tensor:
        """One field of Routing over all layers, e.g. stack("router_probs_TX") -> [L, T, X], where the tokens are.

        `column`: the field's name, or a function of a Routing.
        """
        take = column if callable(column) else lambda routing: getattr(routing, column)
        values = [take(routing) for routing in self.routings.values()]
        device = values[0].device if self.sample_T is None else self.sample_T.device
        return torch.stack([value.to(device) for value in values])

    def mark_read(self) -> None:
        """Note that the routing losses of `forward` have been asked for."""
        if self.forward is not None:
            self.forward.reading.is_done = True


# -- activation checkpointing ------------------------------------------------------------------------------------------

# Where a module keeps its checkpoint function: transformers' layers, and torch.distributed's checkpoint_wrapper.
CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


def routing_context(model: nn.Module) -> RoutingContext | None:
    """The RoutingContext of a model with routers of ours, however wrapped (PEFT, DeepSpeed, DDP); None for one without.

    Of a MOLE adapter, of a native mixture of experts with null experts, or of a Moma model.

    Its `routings` are those of this thread's last forward, with `[T, X]` probabilities and `[T, K]` picks a layer.

    Example:
        >>> import torch, mllm, peft
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> mllm.routing_context(base) is None
        True
        >>> model = peft.get_peft_model(base, mllm.MoleConfig(r=2, num_experts=3))
        >>> output = model(input_ids=torch.ones(2, 5, dtype=torch.long))
        >>> mllm.routing_context(model).stack("router_probs_TX").shape  # layers, tokens, experts
        torch.Size([1, 10, 3])
    """
    for module in model.modules():
        if isinstance(context := getattr(module, "routing_context", None), RoutingContext):
            return context
    return None


def in_backward() -> bool:
    """Whether this thread runs a backward pass, so that a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class UnknownTokens:
    """Stands for the tokens of a recomputation that nobody could tell. Routers that ask for none do not mind."""

    barred: ClassVar[tuple[int, ...]] = ()  # experts are barred when answers are given, and nothing is recomputed then

    def on(self, device: torch.device) -> UnknownTokens:
        return self

    def __getattr__(self, name: str) -> Any:
        raise UserError(
            "A layer is recomputed in backward by activation checkpointing that mllm does not know: nobody can tell "
            f"which forward's tokens it sees ({name} was asked for). Use "
            "model.gradient_checkpointing_enable({'use_reentrant': False})."
        )


class CarriesTokens:
    """A checkpoint function that runs what it is given with the tokens of the forward that called it, each time.

    The function that is run again in backward holds them itself, so it does not matter when, in which thread or in
    what order that happens.
    """

    def __init__(self, context: RoutingContext, checkpoint: Callable[..., Any]) -> None:
        self.context, self.checkpoint = context, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context, tokens = self.context, self.context.tokens

        def with_tokens(*args: Any, **kwargs: Any) -> Any:
            with context.recomputing(tokens):
                return function(*args, **kwargs)

        return self.checkpoint(with_tokens, *args, **kwargs)


def _carries(checkpoint: Any, context: RoutingContext) -> bool:
    while isinstance(checkpoint, CarriesTokens):
        if checkpoint.context is context:
            return True
        checkpoint = checkpoint.checkpoint
    return False


def _entry(forward: Forward) -> Entry | None:
    """What a forward tells its cache; None where it showed no picture."""
    if forward.told is None:
        return None
    is_patch_BS, rows = forward.told
    places = is_patch_BS.any(0).nonzero().flatten().tolist()
    return Entry(forward.past + places[0], forward.past + places[-1] + 1, rows) if places else None


def _watch(output: Any, reading: Reading) -> None:
    """Have `reading` checked when the backward pass of a model's output begins."""
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    for part in parts:
        if isinstance(part, Tensor) and part.requires_grad:
            part.register_hook(reading.check)
