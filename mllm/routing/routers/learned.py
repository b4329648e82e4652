"""A learned linear router, as all four papers have it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.routing.context import Tokens
from mllm.routing.layout import MODALITIES
from mllm.routing.routers.base import Router, RouterSpec, without_autocast


class LearnedRouter(Router):
    """(x W + b) / temperature, learned. Framework's initialisation, bias included (LLaVA-MoLE, 2401.16160).

    Computes in fp32 whatever the model computes in: the input and the weights are cast up and autocast is off inside,
    because near-ties in bf16 logits would be broken by rounding. In training, jitter multiplies the input by a uniform
    value in [1 - jitter, 1 + jitter] (Switch, 2101.03961). With null_logits="shared" the null experts of one set share
    one learned logit (2601.15370). With modality_prior a learned bias for each modality, zero at first, is added to
    the logits: a soft form of modality-aware groups.
    """

    options = frozenset({"null_logits", "temperature", "jitter", "modality_prior"})
    is_linear = True

    def __init__(self, spec: RouterSpec) -> None:
        super().__init__(spec)
        layout = spec.layout
        rows, row_of_X = layout.num_experts, list(range(layout.num_experts))
        for null_set in layout.null_sets:
            size = null_set.stop - null_set.start
            row_of_X += [rows] * size if spec.null_logits == "shared" else range(rows, rows + size)
            rows = row_of_X[-1] + 1
        self.weight = nn.Parameter(torch.empty(rows, spec.width))
        self.bias = nn.Parameter(torch.empty(rows))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.uniform_(self.bias, -1 / math.sqrt(spec.width), 1 / math.sqrt(spec.width))
        self.prior = nn.Parameter(torch.zeros(len(MODALITIES), rows)) if spec.modality_prior else None
        self.row_of_X = row_of_X if rows < len(row_of_X) else None

    def forward(self, hidden_TD: Tensor, tokens: Tokens) -> Tensor:
        with without_autocast(hidden_TD):
            hidden_TD = hidden_TD.float()
            if self.training and self.spec.jitter > 0:
                hidden_TD = hidden_TD * torch.empty_like(hidden_TD).uniform_(1 - self.spec.jitter, 1 + self.spec.jitter)
            logits_TX = F.linear(hidden_TD, self.weight.float(), self.bias.float())
            if self.prior is not None:
                logits_TX = logits_TX + self.prior.float()[tokens.modality_T]
            if self.row_of_X is not None:
                logits_TX = logits_TX[:, self.row_of_X]
            return logits_TX / self.spec.temperature
