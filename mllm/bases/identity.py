"""Which base an adapter was trained on: samples of every weight, few enough to keep in its base card.

A sample is compared as a bfloat16 number, so that a base stored in float32, float16 or bfloat16 is the same base.
"""

import base64
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from mllm.common.errors import UserError

SAMPLES = 32  # values of a tensor: 60 kB of base card for a 7B model
GOLDEN = 0.6180339887498949  # steps of this share of a tensor fall into all its rows and columns
PARTS = {
    "vision tower": "model.vision_tower",
    "projector": "model.multi_modal_projector",
    "language model": "model.language_model",
    "head": "lm_head",
}
# float32 rounded to the finer float16 first lands beside its own bfloat16 in one of sixteen values: of a part hardly
# ever in one of eight, of one tensor's 32 samples hardly ever in a third.
ROUNDED_SHARE = 1 / 8
ROUNDED_SHARE_OF_TENSOR = 1 / 3
FINEST_HALF = 2**-14  # below it float16 keeps fewer digits than bfloat16


def base_module(module: nn.Module) -> nn.Module:
    """What PEFT has wrapped, as the base brought it; any other module is itself."""
    while isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
        is_copy = isinstance(module, AuxiliaryTrainingWrapper)
        module = module.original_module if is_copy else module.get_base_layer()
    return module


def base_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the base alone, whatever PEFT has put around them; names are those of the bare base."""
    module = base_module(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield f"{prefix}{name}", tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from base_tensors(child, f"{prefix}{name}.")


def sampled(tensor: Tensor) -> Tensor:
    """[at most SAMPLES] bfloat16 values, spread over the tensor.

    Raises:
        ValueError: the tensor is not whole in this process (meta device, a ZeRO-3 partition): gather it first.
    """
    if tensor.is_meta or tensor.numel() == 0:
        raise ValueError("a base is told by whole weights in this process; gather partitioned ones first.")
    flat = tensor.detach().flatten()
    if flat.numel() > SAMPLES:
        places = torch.arange(SAMPLES, dtype=torch.float64) * GOLDEN % 1 * flat.numel()
        flat = flat[places.long().to(flat.device)]
    return flat.to(torch.bfloat16, copy=True)  # never a view of what is trained


def weight_digest(weight: Tensor) -> str:
    """Sixteen digits for a whole tensor rounded to bfloat16: the same for a model loaded in fp32 and in bf16."""
    rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(rounded.view(torch.int16).numpy().tobytes()).hexdigest()[:16]  # numpy has no bfloat16


def base_samples(model: PreTrainedModel | PeftModel) -> dict[str, dict[str, Tensor]]:
    """Part -> tensor's name -> its samples, on the CPU; of what is no LLaVA all is the part "model".

    Raises ValueError as `sampled` does.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    is_llava = isinstance(base, LlavaForConditionalGeneration)
    found: dict[str, dict[str, Tensor]] = {}
    for part, path in (PARTS if is_llava else {"model": ""}).items():
        prefix = f"{path}." if path else ""
        samples = {name: sampled(tensor) for name, tensor in base_tensors(base.get_submodule(path), prefix)}
        # One copy a part: on a GPU each would wait for the device.
        devices = {values.device for values in samples.values()}
        if devices == {torch.device("cpu")} or len(devices) > 1:
            found[part] = {name: values.cpu() for name, values in samples.items()}
        else:
            whole = torch.cat(list(samples.values())).cpu().split([len(values) for values in samples.values()])
            found[part] = dict(zip(samples, whole, strict=True))
    return found


def to_card(samples: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, str]]:
    """The samples as JSON can hold them: for each part a hash of its tensors' names, and the values in order."""
    return {
        part: {
            "tensors": _structure(of),
            "values": base64.b64encode(torch.cat(list(of.values())).view(torch.uint8).numpy().tobytes()).decode(),
        }
        for part, of in samples.items()
    }


def difference(card: dict[str, dict[str, str]], found: dict[str, dict[str, Tensor]]) -> str | None:
    """What tells a base from the one of a card, in words that go on with "its …"; None for the same base."""
    for part, of in found.items():
        known = card.get(part)
        if known is None or known["tensors"] != _structure(of):
            return f"{part} is built differently"
        names = [name for name, values in of.items() for _ in range(len(values))]
        values = torch.frombuffer(bytearray(base64.b64decode(known["values"])), dtype=torch.bfloat16).float()
        if len(values) != len(names):
            return f"{part} is of other sizes"
        came = torch.cat(list(of.values())).float()
        gap, size = (values - came).abs(), torch.maximum(values.abs(), came.abs())
        is_other = ~(gap <= size * 2**-7 + 2**-24)  # a step of bfloat16, or of float16's smallest numbers
        if is_other.any():
            return f"{part} has other weights, such as {names[int(is_other.nonzero()[0])]}"
        is_moved = ((gap > 0) & (size >= FINEST_HALF)).float()
        if is_moved.mean() > ROUNDED_SHARE:
            return f"{part} has slightly other weights ({is_moved.mean():.0%} of its samples differ)"
        for name, moved in zip(of, is_moved.split([len(values) for values in of.values()]), strict=True):
            if len(moved) == SAMPLES and moved.mean() > ROUNDED_SHARE_OF_TENSOR:
                return f"{part} has slightly other weights, such as {name}"
    return None


def changed_tensors(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> list[str]:
    """Names of the tensors whose samples are others than before, or that came or went."""
    old, new = ({name: t for of in samples.values() for name, t in of.items()} for samples in (before, after))
    return [name for name in old | new if name not in old or name not in new or not torch.equal(old[name], new[name])]


def check_start_keeps_base(
    config: Any, before: dict[str, dict[str, Tensor]], model: PeftModel, allowed: set[str] = frozenset()
) -> None:
    """Refuses an adapter whose start has changed frozen weights: they are not saved with it, so it would be lost.

    Args:
        config: the adapter's PEFT config.
        before: samples of the base as it was read.
        model: the base with the adapter on it.
        allowed: names of the base's tensors that the adapter holds itself.

    Raises:
        UserError: a frozen weight differs; the start is named.
    """
    changed = [name for name in changed_tensors(before, base_samples(model)) if name not in allowed]
    if changed:
        start = getattr(config, "init_lora_weights", None)
        raise UserError(
            f"The adapter's start (init_lora_weights={start!r}) changes {len(changed)} frozen weights of the base, such"
            f" as {changed[0]}. They are not saved with an adapter, so what is trained on them could not be loaded "
            "again. Use init_lora_weights: true, gaussian or orthogonal, or convert the adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…)."
        )


def _structure(of: dict[str, Tensor]) -> str:
    return hashlib.sha256("\n".join(of).encode()).hexdigest()[:16]
