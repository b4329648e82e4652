"""Plain LoRA with as many weights as the routers have: the rival that tunes something else by the same loss.

I input width, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mllm.alignment.align import row_order
from mllm.alignment.data import AlignmentData
from mllm.alignment.routes import RoutedLayer, decoder_layers
from mllm.alignment.tail import answer_logits


class LowRank(nn.Module):
    """Adds x A B to a linear's output; nothing at first."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.a_I1 = nn.Parameter(torch.empty(in_features, 1))
        self.b_1O = nn.Parameter(torch.zeros(1, out_features))
        nn.init.kaiming_uniform_(self.a_I1, a=math.sqrt(5))

    def forward(self, _: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """As a forward hook of the linear."""
        return output + (args[0].float() @ self.a_I1 @ self.b_1O).to(output.dtype)


class SmallLora:
    """Ranks of one on attention linears of the aligned layers, round after round, up to a number of weights."""

    def __init__(self, model: nn.Module, layers: Sequence[RoutedLayer], weights: int) -> None:
        model.requires_grad_(False)
        linears = [
            module
            for depth in sorted({layer.depth for layer in layers}, reverse=True)
            for name, module in decoder_layers(model)[depth].named_modules()
            if isinstance(module, nn.Linear) and "attn" in name
        ]
        self.linears, self.ranks, self.hooks = [], [], []
        while not self.ranks or self.num_weights < weights:
            self.linears.append(linears[len(self.ranks) % len(linears)])
            self.ranks.append(LowRank(self.linears[-1].in_features, self.linears[-1].out_features))
        self.attach()

    @property
    def num_weights(self) -> int:
        """Trained weights."""
        return sum(p.numel() for rank in self.ranks for p in rank.parameters())

    def attach(self) -> None:
        """Puts it on the model."""
        self.hooks = [linear.register_forward_hook(rank) for linear, rank in zip(self.linears, self.ranks, strict=True)]

    def remove(self) -> None:
        """Takes it off the model."""
        for hook in self.hooks:
            hook.remove()


def train_lora(
    model: nn.Module, data: AlignmentData, layers: Sequence[RoutedLayer], weights: int, *, rows: Sequence[int],
    steps: int, batch_size: int, lr: float, seed: int,
) -> SmallLora:  # fmt: skip
    """By the answers' loss, in the very order of rows that the aligned arms see."""
    torch.manual_seed(seed)
    lora = SmallLora(model, layers, weights)
    optimizer = torch.optim.AdamW([p for rank in lora.ranks for p in rank.parameters()], lr=lr, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, steps // 10)))
    for batch in row_order(rows, steps, batch_size, seed):
        inputs, labels_BS, _ = data.batch(batch)
        logits_TV, targets_T, _ = answer_logits(model, inputs, labels_BS)
        nn.functional.cross_entropy(logits_TV, targets_T).backward()
        nn.utils.clip_grad_norm_([p for rank in lora.ranks for p in rank.parameters()], 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad(set_to_none=True)
    return lora
