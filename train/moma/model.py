"""The model of a run and its vocabulary: new, or from an earlier run; and how a finished one is written."""

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mllm.build import load_processor
from mllm.common.errors import UserError
from mllm.common.folders import written_whole
from mllm.common.names import check_keys
from mllm.moma import (
    MomaConfig,
    MomaForCausalLM,
    from_language_model,
    language_model_config,
    layers_at_equal_flops,
    upcycle,
    upcycled_config,
)
from mllm.moma.image_tokens import ImageTokenizer
from mllm.moma.processor import MomaProcessor
from train.fields import checked_fields
from train.moma.config import MomaModelSection, MomaTrainConfig

MODEL = "model"  # folder of a finished run's model
HISTORY = "training.json"  # in it: how many rows of which data it has seen


def build_moma(config: MomaTrainConfig) -> tuple[MomaForCausalLM, MomaProcessor]:
    """The model with what its stage trains, in fp32, and its vocabulary. Every rank reads the whole model.

    Raises UserError for fields that do not exist or fit, and folders that do not hold what they should.
    """
    section = config.model
    processor = build_processor(section)
    if config.stage == "train_causal_routers":
        model = MomaForCausalLM.from_pretrained(section.start_from, use_safetensors=True)
        processor.check(model.config)
        model.begin_auxiliary_stage()
    elif config.stage == "upcycle":
        model = upcycled(section, processor)
    else:
        model = MomaForCausalLM(moma_config(section, processor))
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.float(), processor


def build_processor(section: MomaModelSection) -> MomaProcessor:
    """The vocabulary of a model to come, or that of the model it starts from."""
    if section.start_from is None:
        tokenizer = (
            load_processor("miniworld").tokenizer
            if section.text_tokenizer == "miniworld"
            else AutoTokenizer.from_pretrained(section.text_tokenizer)
        )
        return MomaProcessor(tokenizer, ImageTokenizer.from_pretrained(section.image_tokenizer))
    if kind_of(section.start_from) == MomaConfig.model_type:
        if section.image_tokenizer is not None:
            raise UserError("model.start_from has an image tokenizer of its own: leave model.image_tokenizer out.")
        return MomaProcessor.from_pretrained(section.start_from)
    if section.image_tokenizer is None:
        raise UserError(
            "model.start_from is an ordinary language model: it can be upcycled, with a model.image_tokenizer."
        )
    words = AutoConfig.from_pretrained(section.start_from).vocab_size
    tokenizer = AutoTokenizer.from_pretrained(section.start_from)
    return MomaProcessor(tokenizer, ImageTokenizer.from_pretrained(section.image_tokenizer), words)


def kind_of(folder: Path) -> str:
    """The model type in a folder's config.json. Raises UserError where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"model.start_from: {folder} holds no model (no config.json). Give the folder model/ of a run.")
    return json.loads(path.read_text(encoding="utf-8")).get("model_type", "")


def moma_config(section: MomaModelSection, processor: MomaProcessor) -> MomaConfig:
    """Raises UserError for an unknown field (the nearest is named) and for values that do not go together."""
    check_fields(section)
    try:
        config = MomaConfig.preset(section.preset, **processor.config_fields, **section.fields)
    except (UserError, StrictDataclassError) as error:
        raise UserError(f"model.fields: {error}") from None
    if config.causal_routing == "aux":
        raise UserError(
            "model.fields.causal_routing=aux goes by auxiliary routers, which learn afterwards, in stage "
            "train_causal_routers: leave it out here."
        )
    if config.mixture_of_depths is not None and section.keep_flops:
        config.num_hidden_layers = layers_at_equal_flops(config.num_hidden_layers, config.mixture_of_depths)
    processor.check(config)
    return config


def config_of(config: MomaTrainConfig, processor: MomaProcessor) -> MomaConfig:
    """The config of the model that a run builds, or of the one whose auxiliary routers it trains; no weights are read.

    Raises UserError for what cannot be built.
    """
    section = config.model
    if config.stage == "pretrain_moma":
        return moma_config(section, processor)
    if config.stage == "upcycle":
        seed = seed_config(section, processor)
        return upcycled_config(seed, **upcycling(section, seed))
    found = MomaConfig.from_pretrained(section.start_from)
    processor.check(found)
    if not found.chooses_over_batch:
        raise UserError(
            f"model.start_from: in {section.start_from} nothing is chosen over a batch: it is causal already."
        )
    return found


def seed_config(section: MomaModelSection, processor: MomaProcessor) -> MomaConfig:
    """Of a seed to upcycle, a Moma model or a Llama."""
    kind = kind_of(section.start_from)
    if kind == MomaConfig.model_type:
        config = MomaConfig.from_pretrained(section.start_from)
    elif kind == "llama":
        config = language_model_config(LlamaConfig.from_pretrained(section.start_from), **vocabulary(processor))
    else:
        raise UserError(f"model.start_from: a seed is a Moma model or a Llama, {section.start_from} is {kind!r}.")
    processor.check(config)
    return config


def vocabulary(processor: MomaProcessor) -> dict[str, int]:
    """What `from_language_model` must be told of it."""
    names = ("codebook_size", "bos_token_id", "eos_token_id", "pad_token_id")
    return {name: processor.config_fields[name] for name in names}


def upcycling(section: MomaModelSection, seed: MomaConfig) -> dict[str, Any]:
    """What `upcycle` must be told besides the seed. Raises UserError for an unknown field."""
    check_fields(section)
    groups = MomaConfig.preset(section.preset).expert_groups
    tokens_choose = section.fields.get("routing", seed.routing) == "token_choice"
    noise = {} if tokens_choose else {"router_noise": section.router_noise}
    return {"expert_groups": groups, "fresh": tuple(section.fresh)} | noise | section.fields


def check_fields(section: MomaModelSection) -> None:
    """Puts the fields into the types that MomaConfig has.

    Raises UserError for those it does not have, or that the vocabulary and the preset decide, for values of another
    type, and for no preset.
    """
    decided = {"expert_groups", "vocab_size", "codebook_size", "image_token_start", "begin_image_token_id"}
    decided |= {"end_image_token_id", "bos_token_id", "eos_token_id", "pad_token_id"}
    known = [name for name in MomaConfig().to_dict() if name not in decided]
    section.fields = checked_fields(section.fields, MomaConfig, known, "model.fields")
    try:
        MomaConfig.preset(section.preset)
    except UserError as error:
        raise UserError(f"model.preset: {error}") from None


def upcycled(section: MomaModelSection, processor: MomaProcessor) -> MomaForCausalLM:
    """Many experts from the one or two of a seed, which is a Moma model or a Llama."""
    settings = upcycling(section, seed_config(section, processor))
    if kind_of(section.start_from) == MomaConfig.model_type:
        seed = MomaForCausalLM.from_pretrained(section.start_from, use_safetensors=True)
    else:
        llama, info = LlamaForCausalLM.from_pretrained(
            section.start_from, use_safetensors=True, output_loading_info=True
        )
        check_keys(f"The language model {section.start_from}", "LlamaForCausalLM", info)
        seed = from_language_model(llama, **vocabulary(processor))
    return upcycle(seed, **settings)


# -- what a run leaves -------------------------------------------------------------------------------------------------


def rows_seen(config: MomaTrainConfig, data_digest: str) -> int:
    """Rows of the same data that the model started from has learned already; the stage goes on after them."""
    path = None if config.model.start_from is None else config.model.start_from / HISTORY
    if path is None or not path.is_file():
        return 0
    history = json.loads(path.read_text(encoding="utf-8"))
    same = history["data"] == data_digest and history["seed"] == config.run.seed
    return history["rows_seen"] if same else 0


def gather_model(model: MomaForCausalLM) -> dict[str, Tensor]:
    """All weights and kept buffers, whole, on the CPU. All ranks must call it: under ZeRO-3 it gathers, one by one."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied weights go by two names
    weights: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = parameters.get(name, tensor)
        if id(whole) not in copies:
            gathered = [whole] if hasattr(whole, "ds_id") else []
            with deepspeed.zero.GatheredParameters(gathered, enabled=bool(gathered)):
                copies[id(whole)] = whole.detach().to("cpu", copy=True)
        weights[name] = copies[id(whole)]
    return weights


def write_model(
    folder: Path, model: MomaForCausalLM, weights: dict[str, Tensor], processor: MomaProcessor, history: dict[str, Any]
) -> None:
    """A folder that `mllm generate` reads, whole or not at all. Call it on one rank."""
    with written_whole(folder) as partial:
        model.save_pretrained(partial, state_dict=weights)
        processor.save_pretrained(partial)
        (partial / HISTORY).write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")


def num_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All, and those that learn."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
