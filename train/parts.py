"""The model of a run: base, adapter and what of them is trained, part by part; and how the trained weights are saved.

Parts are what a learning rate can be given to: projector, attention, experts, router, tower, embeddings, other.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from mllm.bases.identity import base_samples, check_start_keeps_base
from mllm.build import BASE_CARD, PROJECTOR_FILE, load
from mllm.common.errors import UserError
from mllm.common.folders import written_whole
from mllm.common.names import check_names, matches, nearest
from mllm.mole import MoleConfig, MoleModel
from mllm.mole.start import Start
from mllm.mole.targets import block_linears, find_targets
from train.config import ModelSection, OptimSection, TrainConfig
from train.fields import checked_fields, suggest

PROJECTOR = "multi_modal_projector"
TOWER = "vision_tower"
# Names of modules, as the language models of transformers have them.
EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out", "word_embeddings", "embed_positions"}
ROUTERS = {"mole_router", "router", "gate"}
ATTENTIONS = {"attn", "attention"}
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
# Of LoraConfig: what was tried to be the same model once saved and loaded. The rest needs a preparation or a loss that
# `mllm train` does not have, or changes what an adapter is.
LORA_FIELDS = {
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "use_dora",
    "lora_bias",
    "target_parameters",
    "ensure_weight_tying",
}
LAYER = r".*?\.[^.]*\.(\d+)\."  # PEFT's way to a layer's number where layers_pattern is not given
LORA_STARTS = (True, False, "gaussian", "orthogonal", "mica")


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
    known = known_fields(config_class)
    values = checked_fields(values, config_class, known, key)
    if config_class is LoraConfig:
        check_lora_fields(values, key)
    try:
        return config_class(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(told_of(str(error), key, config_class.__name__, known)) from None


def known_fields(config_class: type[PeftConfig]) -> list[str]:
    """Names of the fields that a user may set."""
    return [field.name for field in fields(config_class) if field.init and field.name not in RESERVED]


def told_of(message: str, key: str, class_name: str, known: list[str]) -> str:
    """A message about a config's field, with the dotted key that the user wrote in place of the class's name."""
    message = message.replace(f"{class_name}.", f"{key}.").replace(f"{class_name}:", f"{key}:")
    if key in message:
        return message
    return f"{key}.{message}" if re.match(r"\w+", message)[0] in known else f"{key}: {message}"


def check_lora_fields(values: Mapping[str, Any], key: str) -> None:
    """Raises UserError for options of LoRA that would be lost when the adapter is saved, or need more than training."""
    for field in fields(LoraConfig):
        if field.name not in values or field.name in LORA_FIELDS:
            continue
        default = field.default if field.default is not MISSING else field.default_factory()
        if values[field.name] != default:
            raise UserError(
                f"{key}.{field.name}={values[field.name]!r} is an option of PEFT's that mllm train does not take: it "
                "was not shown that a saved adapter with it is the one that was trained. Leave it out."
            )
    start = values.get("init_lora_weights", True)
    if not any(start is known or (isinstance(known, str) and start == known) for known in LORA_STARTS):
        raise UserError(
            f"{key}.init_lora_weights={start!r} changes frozen weights of the base or needs data beforehand: not what "
            f"an adapter holds. Choose one of {', '.join(map(str, LORA_STARTS)).lower()}."
        )


def starts_from_adapter(section: ModelSection) -> bool:
    """Whether `start_from` is a whole adapter, not just the projector of a stage projector run."""
    return section.start_from is not None and (section.start_from / "adapter_config.json").is_file()


def build_model(config: TrainConfig) -> tuple[PeftModel | LlavaForConditionalGeneration, LlavaProcessor]:
    """The model with the stage's weights set to train, in fp32; the rest frozen, in `model.dtype`.

    Every rank reads the whole base into host memory, also under ZeRO-3, which splits it when the engine starts:
    adapters made on weights that transformers had split while loading would be of size zero.
    """
    section = config.model
    is_adapter = starts_from_adapter(section)
    if is_adapter and (section.adapter is not None or config.stage == "projector"):
        raise UserError(
            f"model.start_from {section.start_from} is a whole adapter, whose settings are kept: drop model.adapter"
            " and use stage instruct. To take only a projector, give the folder of a stage projector run."
        )
    model, processor = load(
        section.path, adapter=section.start_from, dtype=DTYPES[section.dtype], is_trainable=is_adapter
    )
    if config.stage == "projector":
        model.requires_grad_(False)
        model.get_submodule(projector_name(model)).requires_grad_(True)
    elif not is_adapter:
        if section.adapter is None:
            raise UserError(f"model.start_from {section.start_from} holds no adapter: give model.adapter.")
        model = put_on(complete(adapter_config(section), model, section), model)
        # As the user named it: PEFT would write the folder the base was read from, which only this machine has.
        model.peft_config["default"].base_model_name_or_path = section.path
    leave_unread_frozen(model)
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.data.special_tokens_in_text is not None:
        processor.special_tokens_in_text = config.data.special_tokens_in_text
    return model, processor


def complete(adapter: PeftConfig, model: PreTrainedModel, section: ModelSection) -> PeftConfig:
    """Fill in what the model decides: targets of a plain LoRA, and the projector.

    A plain LoRA goes where MOLE puts its experts and its attention LoRA, so that two arms differ in the experts alone.
    """
    asked = adapter.modules_to_save or []
    is_asked = any(matches(asked, name) for name, _ in model.named_modules() if PROJECTOR in name.split("."))
    adapter.modules_to_save = [*asked, PROJECTOR] if section.train_projector and not is_asked else asked
    if isinstance(adapter, LoraConfig) and adapter.target_modules is None:
        targets = find_targets(model, MoleConfig())
        blocks = {name: block_linears(model.get_submodule(name)) for name in targets.blocks}
        adapter.target_modules = [*targets.linears, *(f"{name}.{linear}" for name in blocks for linear in blocks[name])]
    return adapter


def put_on(adapter: PeftConfig, model: PreTrainedModel) -> PeftModel:
    """The model with a new adapter on it.

    Raises:
        UserError: a name or number in its settings matches nothing, PEFT refuses it, or its start changes frozen
            weights.
    """
    before, asked = base_samples(model), deepcopy(adapter)  # PEFT rewrites lists of names
    modules, parameters = ([name for name, _ in each] for each in (model.named_modules(), model.named_parameters()))
    if isinstance(adapter, LoraConfig):
        check_lora_names(asked, model, modules, parameters)
    try:
        adapted = get_peft_model(model, adapter)
    except UserError:
        raise
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, re.error) as error:
        if asked.target_modules != "all-linear":
            check_names("model.adapter.target_modules", asked.target_modules, modules, where="module of the model")
        told = " ".join(str(error).split())
        raise UserError(f"model.adapter: PEFT refuses it: {told[:400]}{' …' * (len(told) > 400)}") from error
    if isinstance(adapter, LoraConfig):
        check_lora_targets(asked, adapted, modules)
    check_start_keeps_base(adapter, before, adapted)
    return adapted


def check_lora_names(config: LoraConfig, model: PreTrainedModel, modules: list[str], parameters: list[str]) -> None:
    """Raises UserError for what names no module, parameter or token of the bare model; the nearest name is given."""
    for field in ("exclude_modules", "modules_to_save"):
        check_names(f"model.adapter.{field}", getattr(config, field), modules, where="module of the model")
    for pattern, whole in zip(as_list(config.layers_pattern), layer_patterns(config), strict=True):
        if not any(re.match(whole, name) for name in modules):
            lists = {name.split(".")[-2] for name in modules if name.rpartition(".")[2].isdigit()}
            raise UserError(f"model.adapter.layers_pattern: {pattern!r} matches no list{nearest(pattern, lists)}.")
    for name in config.target_parameters or ():
        check_names("model.adapter.target_parameters", [name], parameters, where="parameter of the model")
    indices = config.trainable_token_indices
    if indices is None:
        return
    tables = indices if isinstance(indices, dict) else {"": indices}
    check_names("model.adapter.trainable_token_indices", filter(None, tables), modules, where="module of the model")
    for name, tokens in tables.items():
        found = [module for module in modules if module == name or module.endswith(f".{name}")]
        table = model.get_submodule(found[0]) if name else model.get_input_embeddings()
        rows = len(table.weight)
        wrong = [token for token in tokens if not 0 <= token < rows]
        if wrong:
            raise UserError(
                f"model.adapter.trainable_token_indices: {wrong[0]} is no token: there are 0 to {rows - 1}."
            )


def as_list(value: Any) -> list[Any]:
    """A setting that may be one, several or none."""
    return [] if value is None else [value] if isinstance(value, str | int) else list(value)


def layer_patterns(config: LoraConfig) -> list[str]:
    """For each of `layers_pattern` the expression by which PEFT finds a layer's number in a module's name."""
    return [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in as_list(config.layers_pattern)]


def check_lora_targets(config: LoraConfig, model: PeftModel, modules: list[str]) -> None:
    """Raises UserError for what led to no LoRA: a name, a layer's number or a pattern, although others did."""
    tuner = model.base_model
    targeted = list(tuner.targeted_module_names)
    excluded = [name for name in modules if config.exclude_modules and matches(config.exclude_modules, name)]
    targeted_parameters = list(tuner.targeted_parameter_names)
    where = "module that takes LoRA"
    if config.target_modules != "all-linear":
        met = targeted + excluded
        check_names("model.adapter.target_modules", config.target_modules, met, where=where, known=modules)
    asked = config.layers_to_transform
    if asked is not None:
        patterns = layer_patterns(config) or [LAYER]
        matched = [m for name in targeted for pattern in patterns if (m := re.match(pattern, name))]
        found = {int(m[1]) for m in matched}
        for layer in as_list(asked):
            if layer not in found:
                raise UserError(
                    f"model.adapter.layers_to_transform: there is no layer {layer} with a module that takes LoRA, but"
                    f" {', '.join(map(str, sorted(found)))}."
                )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or ():
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targeted + targeted_parameters):
                raise UserError(f"model.adapter.{field}: {pattern!r} matches no {where}{nearest(pattern, targeted)}.")


def leave_unread_frozen(model: PeftModel | PreTrainedModel) -> None:
    """Freezes what nothing reads: originals of trained copies, and the tower's blocks after LLaVA's feature layer.

    The tower is tried on one blank picture, before the engine starts. Raises UserError for adapter weights there that
    nothing reads: they would never learn.
    """
    for name, weight in trained(model):
        if "original_module" in name.split("."):  # what a trained copy stands for; bias="all" would let it learn
            weight.requires_grad_(False)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    tower = {name: weight for name, weight in trained(model) if part_of(name) == "tower"}
    if not tower:
        return
    side = base.config.vision_config.image_size
    pixels = torch.zeros(1, 3, side, side, device=base.device, dtype=base.dtype)
    with torch.enable_grad():
        features = base.get_image_features(pixels).pooler_output
        total = sum(each.float().sum() for each in features)
        gradients = torch.autograd.grad(total, list(tower.values()), allow_unused=True)
    unread = {name: weight for (name, weight), got in zip(tower.items(), gradients, strict=True) if got is None}
    adapters = [name for name in unread if getattr(model.base_model, "prefix", "\0") in name]
    if adapters:
        raise UserError(
            f"model.adapter would put {len(adapters)} weights on modules of the vision tower that are never called,"
            f" such as {adapters[0]}: they would never learn. Name the modules in target_modules, or leave the tower"
            " out with exclude_modules: '.*vision_tower.*'."
        )
    for weight in unread.values():
        weight.requires_grad_(False)


def projector_name(model: nn.Module) -> str:
    """Full name of the projector inside a LLaVA."""
    return next(name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] == PROJECTOR)


def part_of(name: str) -> str:
    """Which part a trained parameter belongs to: the module that holds it, by its path.

    "experts" are low-rank weights outside attention, be they one LoRA, and the experts of MoMa; "embeddings" the input
    embedding and the head, LoRA on them included; "other" what belongs to no part, such as norms.
    """
    path = name.split(".")
    if PROJECTOR in path:
        return "projector"
    if TOWER in path:
        return "tower"
    if ROUTERS & set(path):
        return "router"
    if EMBEDDINGS & set(path):
        return "embeddings"
    if any(_is_attention(module) for module in path):
        return "attention"
    is_low_rank = any(module.startswith(("lora_", MoleModel.prefix)) for module in path)
    return "experts" if is_low_rank or "experts" in path else "other"


def _is_attention(module: str) -> bool:
    words = set(re.split(r"[_\d]+", module))
    return bool(words & ATTENTIONS) and not any("norm" in word or word == "ln" for word in words)


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
    """What an adapter folder holds, whole, on the CPU: trained weights, and what else the adapter cannot do without.

    All ranks must call it: under ZeRO-3 it gathers, one parameter at a time.
    """
    tensors = model.state_dict(keep_vars=True)  # knows which buffers are worth keeping
    prefix = getattr(getattr(model, "base_model", None), "prefix", MoleModel.prefix)
    holds_biases = isinstance(model, PeftModel) and getattr(model.active_peft_config, "bias", "none") == "all"
    weights = {}
    for name, tensor in tensors.items():
        # What an adapter holds may be frozen: a router by rule, MiCA's B, statistics in a module trained in full.
        path = name.split(".")
        is_held = any(part.startswith(prefix) or part == "modules_to_save" for part in path)
        is_held |= holds_biases and path[-1] == "bias" and "original_module" not in path
        if not is_held and not tensor.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            weights[name] = tensor.detach().to("cpu", copy=True)
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
    with written_whole(folder) as partial:
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
