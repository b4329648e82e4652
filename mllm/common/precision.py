"""Which device and floating-point type to load and compute in on this machine."""

from __future__ import annotations

import torch

from mllm.common.errors import UserError

# A CPU's instructions for 16-bit types are what oneDNN finds; torch has no public question for it.
INSTRUCTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def suitable(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where this machine does not compute in it: a GPU, or a CPU where there is no GPU.

    A CPU without the instructions takes tens of times longer for a product of bfloat16 matrices than of float32: on a
    core with AVX2 alone (AMD EPYC, Zen 3) 1.4 GFLOP/s against 40. V100 and T4 have no bfloat16 either.
    """
    if dtype not in INSTRUCTIONS:
        return dtype
    if torch.accelerator.is_available():
        return torch.float32 if dtype == torch.bfloat16 and lacks_bf16() else dtype
    is_supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, INSTRUCTIONS[dtype])()
    return dtype if is_supported else torch.float32


def has_bf16() -> bool:
    """Whether this machine computes in bfloat16 as fast as in float32, or faster."""
    return suitable(torch.bfloat16) == torch.bfloat16


def lacks_bf16() -> bool:
    """Whether there is a GPU that only emulates bfloat16. (Asked plainly, torch counts emulation as support.)"""
    if not torch.cuda.is_available():
        return False
    try:
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    except RuntimeError:  # no driver, or no memory left to ask: whoever computes on that GPU will say so
        return False


def find_device(name: str | None, key: str) -> str:
    """A device by its name, or without one the first GPU, or else the CPU.

    Raises UserError, naming `key`, for a name that torch does not know and a device that is not there.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{key} is {name!r}: expected cpu, cuda, or a GPU by its number, such as cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{key} is {name!r}, but {torch.cuda.device_count()} GPU(s) are visible.")
    return name
