"""The model of a run: base, adapter and what of them is trained, part by part; and how the trained weights are saved.

Parts are what a learning rate can be given to: projector, attention, experts, router.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from mllm.build import BASE_CARD, PROJECTOR_FILE, load
from mllm.errors import UserError
from mllm.mole import MoleConfig, MoleModel
from mllm.mole.start import Start
from mllm.mole.targets import block_linears, find_targets
from train.config import ModelSection, OptimSection, TrainConfig, suggest

PROJECTOR = "multi_modal_projector"
PARTS = ("projector", "attention", "experts", "router")
ADAPTER_TYPES: dict[str, type[PeftConfig]] = {"mole": MoleConfig, "lora": LoraConfig}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Set by us, or without a meaning here.
RESERVED = {
    "peft_type",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
}


def adapter_config(section: ModelSection) -> PeftConfig | None:
    """The PEFT config that `model.adapter` describes, or None without one.

    Raises:
        UserError: no or an unknown type, an unknown field (the nearest is named), or a value that does not fit.
    """
    return None if section.adapter is None else make_adapter(section.adapter, "model.adapter")


def make_adapter(values: Mapping[str, Any], key: str) -> PeftConfig:
    """The PEFT config of `{type: mole | lora, …}`. Raises UserError as `adapter_config` does, naming `key`."""
    values = dict(values)
    kind = values.pop("type", None)
    if kind not in ADAPTER_TYPES:
        raise UserError(f"{key}.type is {kind!r}" + suggest(str(kind), list(ADAPTER_TYPES)))
    config_class = ADAPTER_TYPES[kind]
    known = [field.name for field in fields(config_class) if field.init and field.name not in RESERVED]
    for name in values:
        if name not in known:
            raise UserError(f"unknown key {key}.{name}" + suggest(name, known))
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {error}") from None


def starts_from_adapter(section: ModelSection) -> bool:
    """Whether `start_from` is a whole adapter, not just the projector of a stage align run."""
    return section.start_from is not None and (section.start_from / "adapter_config.json").is_file()


def build_model(config: TrainConfig) -> tuple[PeftModel | LlavaForConditionalGeneration, LlavaProcessor]:
    """The model with the stage's weights set to train, in fp32; the rest frozen, in `model.dtype`.

    Every rank reads the whole base into host memory, also under ZeRO-3, which splits it when the engine starts:
    adapters made on weights that transformers had split while loading would be of size zero.
    """
    section = config.model
    is_adapter = starts_from_adapter(section)
    if is_adapter and (section.adapter is not None or config.stage == "align"):
        raise UserError(
            f"model.start_from {section.start_from} is a whole adapter, whose settings are kept: drop model.adapter"
            " and use stage instruct. To take only a projector, give the folder of a stage align run."
        )
    model, processor = load(
        section.path, adapter=section.start_from, dtype=DTYPES[section.dtype], is_trainable=is_adapter
    )
    if config.stage == "align":
        model.requires_grad_(False)
        model.get_submodule(projector_name(model)).requires_grad_(True)
    elif not is_adapter:
        if section.adapter is None:
            raise UserError(f"model.start_from {section.start_from} holds no adapter: give model.adapter.")
        model = get_peft_model(model, complete(adapter_config(section), model, section))
        # As the user named it: PEFT would write the folder the base was read from, which only this machine has.
        model.peft_config["default"].base_model_name_or_path = section.path
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, processor


def complete(adapter: PeftConfig, model: PreTrainedModel, section: ModelSection) -> PeftConfig:
    """Fill in what the model decides: targets of a plain LoRA, and the projector.

    A plain LoRA goes where MOLE puts its experts and its attention LoRA, so that two arms differ in the experts alone.
    """
    if adapter.modules_to_save is None:
        adapter.modules_to_save = [PROJECTOR] if section.train_projector else []
    if isinstance(adapter, LoraConfig) and adapter.target_modules is None:
        targets = find_targets(model, MoleConfig())
        blocks = {name: block_linears(model.get_submodule(name)) for name in targets.blocks}
        adapter.target_modules = [*targets.linears, *(f"{name}.{linear}" for name in blocks for linear in blocks[name])]
    return adapter


def projector_name(model: nn.Module) -> str:
    """Full name of the projector inside a LLaVA."""
    return next(name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] == PROJECTOR)


def part_of(name: str) -> str:
    """Which part a trained parameter belongs to, by its full name."""
    if PROJECTOR in name:
        return "projector"
    if "router" in name:
        return "router"
    return "attention" if "attn" in name or "attention" in name else "experts"


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def part_rate(optim: OptimSection, part: str) -> float:
    """The learning rate of a part."""
    return getattr(optim.part_lr, part) or optim.lr


def router_rate_after(optim: OptimSection, start: Start | None) -> OptimSection:
    """The settings with which routers learn after `start`, which `start_routers` gave; None: they did not start so.

    A rate of routers' own is for routers that are set already. Those that pictures could not set start at random, and
    have to learn as fast as all else.
    """
    if start is None or start.is_set:
        return optim
    return optim.model_copy(update={"part_lr": optim.part_lr.model_copy(update={"router": None})})


def parameter_groups(model: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Optimizer groups: one a part, and in it one more for what is not decayed (biases, norms: fewer than two axes)."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in trained(model):
        groups.setdefault((part_of(name), parameter.dim() >= 2), []).append(parameter)
    return [
        {
            "params": params,
            "lr": part_rate(optim, part),
            "weight_decay": optim.weight_decay if decayed else 0.0,
            "part": part,
        }
        for (part, decayed), params in groups.items()
    ]


def gather_adapter(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter folder holds, whole, on the CPU: trained weights, and MOLE's buffers (a frozen router, a bias).

    All ranks must call it: under ZeRO-3 it gathers, one parameter at a time.
    """
    saved = model.state_dict().keys()  # knows which buffers are worth keeping
    weights = {
        name: buffer.to("cpu", copy=True)
        for name, buffer in model.named_buffers()
        if MoleModel.prefix in name and name in saved
    }
    for name, parameter in trained(model):
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def write_adapter(
    folder: Path,
    model: PeftModel | PreTrainedModel,
    weights: dict[str, Tensor],
    *,
    base_card: str,
    start_from: Path | None = None,
) -> None:
    """Writes an adapter folder that `mllm.load` reads, from gathered weights. Call it on one rank.

    The folder appears whole or not at all: it is written beside and renamed. A projector that was started from and
    not trained on is copied along: the adapter does not hold it, and needs it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(partial, state_dict=weights, save_embedding_layers=False)
    else:
        prefix = f"{projector_name(model)}."
        projector = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        save_file(projector, partial / PROJECTOR_FILE, metadata={"format": "pt"})
    aligned = start_from and start_from / PROJECTOR_FILE
    if aligned and aligned.is_file() and not any(PROJECTOR in name for name in weights):
        shutil.copy(aligned, partial)
    (partial / BASE_CARD).write_text(base_card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
