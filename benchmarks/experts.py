"""What sparse LoRA experts cost beside PEFT's LoRA of one expert's rank, path by path and by the share of null picks.

One Llama MLP block, forward and backward, frozen weights in bfloat16; every figure is a ratio to PEFT's LoRA measured
in the same round: ``python -m benchmarks.experts``.
"""

import time
from statistics import median
from typing import Annotated

import peft
import torch
import typer
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.store import store
from mllm import MoleConfig

TOKENS, WIDTH, HIDDEN, RANK = 1024, 1024, 2816, 32
EXPERTS = (4, 16, 64)
NULL_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
PATHS = ("masked", "sorted")


class ChosenRouter(nn.Module):
    """Sends a set share of the tokens to a null expert and the others evenly to real ones, at no cost."""

    def __init__(self, num_experts: int, null_share: float) -> None:
        super().__init__()
        expert_T = torch.arange(TOKENS) % num_experts
        expert_T[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))[: round(null_share * TOKENS)]] = (
            num_experts
        )
        self.logits_TX = torch.zeros(TOKENS, num_experts + 1).scatter(1, expert_T[:, None], 20.0)

    def forward(self, hidden_TD: Tensor, context: object) -> Tensor:
        return self.logits_TX


def language_model() -> LlamaForCausalLM:
    """One layer; only its MLP is used."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=8
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def lora_block() -> nn.Module:
    """The MLP with PEFT's own LoRA on its three linears."""
    config = LoraConfig(r=RANK, target_modules=["gate_proj", "up_proj", "down_proj"])
    return peft.get_peft_model(language_model(), config).base_model.model.model.layers[0].mlp


def expert_block(num_experts: int, path: str, null_share: float) -> nn.Module:
    """The MLP with sparse experts, routed by ``ChosenRouter``."""
    config = MoleConfig(r=RANK, num_experts=num_experts, num_null_experts=1, expert_path=path, target_modules=[])
    block = peft.get_peft_model(language_model(), config).base_model.model.model.layers[0].mlp
    block.mole_router["default"].router = ChosenRouter(num_experts, null_share)
    return block


def seconds(block: nn.Module, hidden: Tensor) -> float:
    """Wall time of a forward and a backward."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        block(hidden).sum().backward()
    return time.perf_counter() - start


def main(
    rounds: Annotated[int, typer.Option(help="Each block is timed once a round; the median ratio counts.")] = 15,
) -> None:
    """Print and keep the ratios."""
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    reference = lora_block()
    cases = {
        (num_experts, path, share): expert_block(num_experts, path, share)
        for num_experts in EXPERTS
        for path in PATHS
        for share in NULL_SHARES
    }
    ratios: dict[tuple, list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case, block in cases.items():
            ratio = seconds(block, hidden) / seconds(reference, hidden)
            if number:  # the first round warms up
                ratios[case].append(ratio)
    figures = [
        {"experts": experts, "path": path, "null_share": share, "ratio_to_lora": round(median(values), 3)}
        for (experts, path, share), values in ratios.items()
    ]
    table = Table("experts", "path", *(f"null {share:.0%}" for share in NULL_SHARES), title="time / PEFT LoRA")
    for experts in EXPERTS:
        for path in PATHS:
            row = [f["ratio_to_lora"] for f in figures if f["experts"] == experts and f["path"] == path]
            table.add_row(str(experts), path, *(f"{ratio:.2f}" for ratio in row))
    Console().print(table)
    about = {"tokens": TOKENS, "width": WIDTH, "hidden": HIDDEN, "rank": RANK, "rounds": rounds, "dtype": "bfloat16"}
    store("experts", about | {"threads": torch.get_num_threads(), "ratios": figures})


if __name__ == "__main__":
    typer.run(main)
