"""The RoutingContext of a Moma model: modality by range of ids, the routing mode, and what experts chose.

B batch, S sequence, T = B·S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllm.moma.expert_choice import ExpertChoice
from mllm.routing import RoutingContext, Tokens
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
