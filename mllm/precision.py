"""Which floating-point type to load and compute in on this machine."""

from __future__ import annotations

import torch

# A CPU's instructions for 16-bit types are what oneDNN finds; torch has no public question for it.
INSTRUCTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def suitable(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where there is nothing but a CPU and that has no instructions for `dtype`.

    Without them a product of bfloat16 matrices takes tens of times longer than one of float32: on a core with AVX2
    alone (AMD EPYC, Zen 3) 1.4 GFLOP/s against 40.
    """
    if dtype not in INSTRUCTIONS or torch.accelerator.is_available():
        return dtype
    is_supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, INSTRUCTIONS[dtype])()
    return dtype if is_supported else torch.float32


def has_bf16() -> bool:
    """Whether this machine computes in bfloat16 as fast as in float32, or faster."""
    return suitable(torch.bfloat16) == torch.bfloat16
