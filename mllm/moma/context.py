"""The RoutingContext of a Moma model: modality by range of ids, the routing mode, and what experts chose.

B batch, S sequence, T = B·S tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.routing import Routing, RoutingContext, Tokens
from mllm.routing.context import of_tokens


@dataclass(eq=False)
class MomaTokens(Tokens):
    """Tokens, and how experts choose among them.

    mode     a name of `mllm.moma.expert_choice.MODES`
    document_BS  int64, which document of its row a token belongs to, where position_ids start anew in a row and there
             is no attention mask (as transformers has it); None where a row is one document
    """

    mode: str = "token"
    document_BS: Tensor | None = None


@dataclass(frozen=True)
class ExpertChoice:
    """What one router's experts chose. Logits and scores are fp32, -inf and 0 where the modality is not the expert's.

    `cutoff_E`: lowest score that was chosen, of all ranks where they choose together; inf where nothing was chosen,
    None where the batch did not choose. `auxiliary_logits_TE`: None where auxiliary routers had nothing to do.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    is_open_TE: Tensor
    is_chosen_TE: Tensor
    cutoff_E: Tensor | None = None
    auxiliary_logits_TE: Tensor | None = None

    def routing(self) -> Routing:
        """The same as a Routing with one slot for each expert; `router_probs_TX` are the scores over their sum."""
        num_experts = self.scores_TE.shape[1]
        return Routing(
            router_logits_TX=self.logits_TE,
            router_probs_TX=self.scores_TE / self.scores_TE.sum(1, keepdim=True).clamp(min=1e-12),
            expert_ids_TK=torch.arange(num_experts, device=self.scores_TE.device).expand_as(self.scores_TE),
            is_taken_TK=self.is_chosen_TE,
            expert_weights_TK=self.scores_TE * self.is_chosen_TE,
            num_experts=num_experts,
        )


class MomaContext(RoutingContext):
    """A RoutingContext whose image tokens are a range of ids, filled by the model itself, without hooks."""

    tokens_class = MomaTokens
    mode, document_BS = of_tokens("mode"), of_tokens("document_BS")

    def __init__(self, image_token_start: int, codebook_size: int) -> None:
        super().__init__()
        self.image_token_start, self.codebook_size = image_token_start, codebook_size

    def __getstate__(self) -> dict[str, Any]:
        sizes = {"image_token_start": self.image_token_start, "codebook_size": self.codebook_size}
        return super().__getstate__() | sizes

    def begin(self, *, mode: str = "token", position_ids: Tensor | None = None, **inputs: Any) -> None:
        """As RoutingContext.begin, in the mode given."""
        super().begin(**inputs)
        tokens = self.tokens
        tokens.mode = mode
        if position_ids is not None and inputs.get("attention_mask") is None and position_ids.shape[1] > 1:
            starts_BS = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).long()
            tokens.document_BS = starts_BS.cumsum(1).expand(tokens.batch_size, -1)
        tokens.is_image_T = None if tokens.token_ids_T is None else self.is_image(tokens.token_ids_T)

    def is_image(self, ids: Tensor) -> Tensor:
        """Which ids are image codes."""
        return (ids >= self.image_token_start) & (ids < self.image_token_start + self.codebook_size)

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several documents."""
        document_BS = self.tokens.document_BS
        return document_BS is not None and bool((document_BS > 0).any())

    @property
    def choices(self) -> dict[str, ExpertChoice]:
        """Name of a router in the model -> its ExpertChoice of the last forward, depth routers among them."""
        return {} if self.forward is None else self.forward.choices

    def record_choice(self, name: str, choice: ExpertChoice) -> None:
        """Keep a router's choice, unless this is recomputation."""
        if self.is_recording:
            self.forward.choices[name] = choice
