"""Does a null pick save time? Forward and backward of one MoE block, with a growing share of picks that are null.

Experts of 512 x 1024, 8 of them, 2 picks a token, 1024 tokens drawn anew each time, everything trained, one thread. A
null pick reaches the experts as the index they skip; here random picks are made so (drop_share), which sets the share.
The shares of a case are measured in turn, round by round, so that whatever else the machine does bears on all alike.
Beside the time on the clock stands the processor's, which a busy machine stretches far less; the load average tells how
busy it was. Ratios are to no nulls; `off_line` is how far they lie from a straight line between the two ends: 0 is in
proportion to the share. "batched_mm" is left out: it copies the weights of every pick, here 13 GB.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from benchmarks.store import store
from mllm.mole.native_moe import NullRouter, add_null_experts

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
WIDTH, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 512, 1024, 8, 2, 1024
SIZES = {
    "vocab_size": 32,
    "hidden_size": WIDTH,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
NARROW = {"num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE}
FAMILIES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=EXPERTS),
    "olmoe": OlmoeConfig(**SIZES, num_experts=EXPERTS),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **NARROW, shared_expert_intermediate_size=INTERMEDIATE),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **NARROW),
}
CASES = [(family, "grouped_mm", "float32") for family in FAMILIES]
CASES += [("olmoe", "grouped_mm", "bfloat16"), ("olmoe", "eager", "float32")]


def measure(family: str, experts: str, dtype: torch.dtype, rounds: int) -> dict[str, dict]:
    """Figures of a forward and backward of the block, by the clock and by the processor: medians over the rounds."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], experts_implementation=experts, dtype=dtype)
    add_null_experts(model, num_null_experts=0, drop_share=SHARES[-1])
    block = model.get_decoder().layers[0].mlp
    (router,) = (module for module in block.modules() if isinstance(module, NullRouter))
    times = {share: [] for share in SHARES}
    for _ in range(rounds + 1):
        for share in SHARES:
            router.config = replace(router.config, drop_share=share)
            hidden = torch.randn(1, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
            start = time.perf_counter(), time.process_time()
            (hidden + block(hidden)).float().square().sum().backward()
            times[share].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            block.zero_grad()
    return {
        clock: figures_of({share: median(pair[i] for pair in pairs[1:]) for share, pairs in times.items()})
        for i, clock in enumerate(("wall", "processor"))
    }


def figures_of(times: dict[float, float]) -> dict:
    ratios = {share: taken / times[0.0] for share, taken in times.items()}
    off_line = max(abs(ratio - (1 - share * (1 - ratios[1.0]))) for share, ratio in ratios.items())
    return {
        "seconds": {str(share): round(taken, 4) for share, taken in times.items()},
        "ratio": {str(share): round(ratio, 3) for share, ratio in ratios.items()},
        "off_line": round(off_line, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    figures = {"experts": EXPERTS, "top_k": TOP_K, "tokens": TOKENS, "rounds": rounds}
    figures |= {"size": [WIDTH, INTERMEDIATE], "load_average": round(os.getloadavg()[0], 1)}
    for family, experts, dtype in CASES:
        case = measure(family, experts, getattr(torch, dtype), rounds)
        figures[f"{family} {experts} {dtype}"] = case
        print(f"{family} {experts} {dtype}:", json.dumps(case), flush=True)
    store("native_moe", figures)


if __name__ == "__main__":
    main()
