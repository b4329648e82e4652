"""The RoutingContext of a Moma model: modality by range of ids, the routing mode, and what experts chose.

B batch, S sequence, T = B·S tokens.
"""

from __future__ import annotations

from typing import Any

from mllm.moma.expert_choice import ExpertChoice
from mllm.routing import RoutingContext


class MomaContext(RoutingContext):
    """A RoutingContext whose image tokens are a range of ids, filled by the model itself, without hooks.

    mode     how this forward chooses: a name of `mllm.moma.expert_choice.MODES`
    choices  name of a router in the model -> its ExpertChoice of the last forward, depth routers among them
    """

    def __init__(self, image_token_start: int, codebook_size: int) -> None:
        super().__init__()
        self.image_token_start, self.codebook_size = image_token_start, codebook_size
        self.mode = "token"
        self.choices: dict[str, ExpertChoice] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"image_token_start": self.image_token_start, "codebook_size": self.codebook_size}

    def begin(self, *, mode: str = "token", **inputs: Any) -> None:
        """As RoutingContext.begin, in the mode given."""
        super().begin(**inputs)
        self.mode, self.choices = mode, {}
        ids_T = self.token_ids_T
        end = self.image_token_start + self.codebook_size
        self.is_image_T = None if ids_T is None else (ids_T >= self.image_token_start) & (ids_T < end)

    def record_choice(self, name: str, choice: ExpertChoice) -> None:
        """Keep a router's choice, unless this is recomputation."""
        if self._recording:
            self.choices[name] = choice
