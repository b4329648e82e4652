"""Which tokens a forward pass carries, and what every router decided about them.

B batch, S sequence, T = B·S tokens in row order, L routed layers, X experts, K picks.
One RoutingContext a model: the model's pre-forward hook fills in the tokens, the layers hand in their routings, losses,
statistics and the demo read both afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import UserError
from mllm.routing.routing import Routing


class RoutingContext:
    """The tokens and routings of the last forward pass.

    Attributes, all of the last forward and kept until the next one (recomputation in backward needs them):
      batch_size, sequence_length  B and S of the tokens of this call (S = 1 in a decode step with a cache)
      is_image_T  [T] bool, True where the token stands for a picture patch; None when a model with pictures was called
                  with embeddings instead of ids, so that nobody can tell
      token_ids_T [T] int64; None when the model was called with embeddings
      is_pad_T    [T] bool, True where a two-dimensional attention mask is 0; without such a mask, nowhere
      sample_T    [T] int64, the row of the batch a token belongs to
      picture_BD  [B, D] fp32, the mean embedding of each row's pictures, see `picture_TD`; None where nobody has seen
                  what enters the language model
      routings    layer name -> Routing, in the order the layers ran

    Recording is on only while the model's forward runs, so activation checkpointing does not record twice.
    With it a forward's tokens are looked up again in backward, so call backward before the next forward: recomputed
    after another one, routers that go by the token (groups, a modality prior, oracles, hashes) would take its tokens.
    """

    def __init__(self, image_token_id: int | None = None) -> None:
        self.image_token_id = image_token_id
        self._forget()

    def _forget(self) -> None:
        self.batch_size = self.sequence_length = 0
        self.is_image_T: Tensor | None = None
        self.token_ids_T: Tensor | None = None
        self.is_pad_T: Tensor | None = None
        self.sample_T: Tensor | None = None
        self.routings: dict[str, Routing] = {}
        self._domains: list[str] | None = None
        self.picture_BD: Tensor | None = None
        self._is_told = False
        self._recording = False
        self._expects_gradient = False
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model starts without the last batch: tensors inside a graph cannot be copied.
        return {"image_token_id": self.image_token_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    # -- where the tokens come from ------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, *, sees_pictures: bool = False) -> None:
        """Follow `model`, the Hugging Face model itself: `PeftModel.generate` does not pass through
        `PeftModel.forward`. `sees_pictures` also follows what enters its decoder, for `picture_TD`.
        """
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]
        if sees_pictures:
            decoder = model.get_decoder()
            self._hooks.append(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))

    def _before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.see(kwargs.get("inputs_embeds"))

    def detach(self) -> None:
        """Stop following the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = kwargs
        if args:
            inputs = kwargs | inspect.signature(model.forward).bind_partial(*args).arguments
        self.begin(
            input_ids=inputs.get("input_ids"),
            inputs_embeds=inputs.get("inputs_embeds"),
            attention_mask=inputs.get("attention_mask"),
            continues=has_past(inputs.get("past_key_values")),
            expects_gradient=model.training and torch.is_grad_enabled(),
        )

    def _after_forward(self, *_: Any) -> None:
        self.end()

    def begin(
        self,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Any = None,
        continues: bool = False,
        picture_BD: Tensor | None = None,
        expects_gradient: bool = False,
    ) -> None:
        """Start a forward: take the tokens, drop the last routings, record from now on.

        `continues`: the call goes on with the rows of the last one, whose keys and values are cached. `picture_BD`
        [B, D] tells the rows' pictures where the language model starts midway, so that its input does not.

        input_ids [B, S] or inputs_embeds [B, S, D] · attention_mask [B, >= S]: in a decode step with a cache it covers
        the past too, and its last S columns are this call's. Masks of any other shape say nothing about padding here.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        self.routings, self._recording, self._expects_gradient = {}, True, expects_gradient
        if not continues or picture_BD is not None:
            self.picture_BD = picture_BD
        self._is_told = picture_BD is not None
        if tokens is None:
            self.is_image_T = self.token_ids_T = self.is_pad_T = self.sample_T = None
            self.batch_size = self.sequence_length = 0
            return
        self.batch_size, self.sequence_length = tokens.shape[:2]
        num_tokens = self.batch_size * self.sequence_length
        rows = torch.arange(self.batch_size, device=tokens.device)
        self.sample_T = rows.repeat_interleave(self.sequence_length)
        self.token_ids_T = None if input_ids is None else input_ids.flatten()
        nowhere_T = torch.zeros(num_tokens, dtype=torch.bool, device=tokens.device)
        if self.image_token_id is None:
            self.is_image_T = nowhere_T
        else:
            self.is_image_T = None if input_ids is None else (input_ids == self.image_token_id).flatten()
        self.is_pad_T = nowhere_T
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            self.is_pad_T = (attention_mask[:, -self.sequence_length :] == 0).flatten().to(tokens.device)

    def set_domains(self, domains: Sequence[str] | None) -> None:
        """Tell the domain of each row of the batches to come, for routers that go by it; None forgets them."""
        self._domains = None if domains is None else list(domains)

    def end(self) -> None:
        """End the forward: what runs from now on is recomputation and is not recorded."""
        self._recording = False

    # -- where the routings go -----------------------------------------------------------------------------------------

    def record(self, layer: str, routing: Routing, *, trainable: bool) -> None:
        """Keep `routing` under the layer's name, unless this is recomputation.

        Raises UserError when a trainable router's record carries no gradient in training: re-entrant activation
        checkpointing runs the forward without a graph, and every routing loss would silently do nothing.
        """
        if not self._recording:
            return
        if self._expects_gradient and trainable and not routing.router_probs_TX.requires_grad:
            raise UserError(
                f"The routing of {layer} carries no gradient although the model is training. This is what re-entrant "
                "activation checkpointing does, and under it routing losses would silently do nothing. Use the "
                "non-reentrant kind: use_reentrant=False."
            )
        if self.sample_T is not None and len(routing.expert_ids_TK) != len(self.sample_T):
            raise UserError(
                f"{layer} routed {len(routing.expert_ids_TK)} tokens, but the model was called with {self.batch_size} "
                f"x {self.sequence_length}: inside a model that drops or adds positions nobody can tell which token is "
                "which. Such a model is not supported."
            )
        self.routings[layer] = routing

    # -- what readers ask for ------------------------------------------------------------------------------------------

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

        Rows that go on from a cache keep their pictures until they show others. So a token that stands before a picture
        in its row is told of it too; in generation it is not, where the picture came later.
        Raises UserError when nobody has seen them: the language model was called by itself with embeddings.
        """
        if self.picture_BD is None:
            raise UserError(
                "A router reads the row's picture, but the language model was not called through the model that holds "
                "it, with input_ids; call the whole model, or set MoleConfig.router_reads='token'."
            )
        return self.picture_BD[self.sample_T]

    def see(self, inputs_embeds: Tensor | None) -> None:
        """Take what enters the language model, [B, S, D]; None where it embeds the tokens itself: then no pictures."""
        if self._is_told or inputs_embeds is None or self.is_image_T is None:
            return
        embeds_TD, is_patch_T = inputs_embeds.detach().flatten(0, 1).float(), self.is_image_T & ~self.is_pad_T
        count_B = self.sample_T.new_zeros(self.batch_size).index_add(0, self.sample_T, is_patch_T.long())
        sums_BD = embeds_TD.new_zeros(self.batch_size, embeds_TD.shape[-1])
        shown_BD = sums_BD.index_add(0, self.sample_T, embeds_TD * is_patch_T[:, None]) / count_B.clamp(min=1)[:, None]
        if self.picture_BD is not None:  # of the cached rows, which beam search repeats
            before_BD = self.picture_BD.repeat_interleave(self.batch_size // len(self.picture_BD), 0)
            shown_BD = shown_BD.where(count_B[:, None] > 0, before_BD)
        self.picture_BD = shown_BD

    @property
    def knows_domains(self) -> bool:
        """Whether the rows' domains have been told."""
        return bool(self._domains)

    def domain_of_row(self) -> list[str]:
        """The domain of each row. Beam search repeats rows, and their domains with them.

        Raises UserError when no domains were set, or their number does not fit the batch.
        """
        if not self._domains:
            raise UserError(
                "Routing goes by the domain, and nobody has told the rows' domains; call "
                "routing_context(model).set_domains([...]) before the forward."
            )
        repeats, rest = divmod(self.batch_size, len(self._domains))
        if rest:
            raise UserError(
                f"{len(self._domains)} domains were set for a batch of {self.batch_size} rows; give one a row."
            )
        return [domain for domain in self._domains for _ in range(repeats)]

    def domain_T(self, known: Sequence[str]) -> Tensor:
        """[T] int64, where in `known` the domain of a token's row stands. Raises UserError for one that does not."""
        unknown = sorted(set(self.domain_of_row()) - set(known))
        if unknown:
            raise UserError(
                f"No expert is meant for domain {unknown[0]!r}; MoleConfig.expert_domains are {', '.join(known)}."
            )
        return self.sample_T.new_tensor([known.index(domain) for domain in self.domain_of_row()])[self.sample_T]

    @property
    def layers(self) -> list[str]:
        """Names of the routed layers, in running order."""
        return list(self.routings)

    def stack(self, field: str) -> Tensor:
        """One field of Routing over all layers, e.g. stack("router_probs_TX") -> [L, T, X]."""
        return torch.stack([getattr(routing, field) for routing in self.routings.values()])


def has_past(past_key_values: Any) -> bool:
    """Whether a model is called with a cache that holds something."""
    return past_key_values is not None and past_key_values.get_seq_length() > 0
