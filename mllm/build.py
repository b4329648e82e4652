"""Parts, or a checkpoint, to (model, processor): the only place that loads backbones.

`build` joins an open_clip tower and a Hugging Face causal LM into transformers' LLaVA; `load` reads one back, with an
adapter if wanted. Model and processor are ordinary transformers objects: `save_pretrained` and `from_pretrained` keep
all of them, image statistics and chat template included.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from accelerate import init_empty_weights
from jinja2.exceptions import TemplateError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import PILImageResampling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.bases import fetched
from mllm.bases.identity import base_module, base_samples, check_start_keeps_base, difference, to_card
from mllm.common.errors import UserError
from mllm.common.names import check_keys, few
from mllm.common.precision import suitable
from mllm.data.template import ConversationEncoder
from mllm.vision_tower import OpenClipVisionConfig, OpenClipVisionModel, wrap_visual

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
MINIWORLD = "miniworld"
BASE_CARD = "base.json"
PROJECTOR_FILE = "projector.safetensors"

# LLaVA-1.5's conversation, for messages whose content is a string or a list of {"type": "text" | "image"} items.
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for item in content -%}{{ '<image>\\n' if item.type == 'image' else item.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ 'USER: ' + text_of(message.content) + ' ' }}
{%- elif message.role == 'assistant' -%}{{ 'ASSISTANT: ' + text_of(message.content) + eos_token }}
{%- else -%}{{ text_of(message.content) + ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""

# Goes before a text model's own template, which expects strings, so that it takes lists of items as well.
FLATTEN_CONTENT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content -%}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for item in message.content -%}{{ '<image>\\n' if item.type == 'image' else item.text }}{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- set flat.messages = flat.messages + [dict(message, content=content ~ '')] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

ResizeMode = Literal["shortest", "longest", "squash"]


def build(
    tower: str | Path | tuple[nn.Module, dict[str, Any]] | OpenClipVisionModel,
    language_model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    pretrained: str | None = None,
    vision_feature_layer: int | list[int] = -2,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    chat_template: str | None = None,
    resize_mode: ResizeMode | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Joins a vision tower (copied), a new projector and a language model (taken as it is) into a LLaVA.

    The tokenizer gets the image token, and a padding token where it has none; the embeddings grow with it.

    Args:
        tower: an open_clip model name ("ViT-B-32"), "hf-hub:owner/name", a folder with `open_clip_config.json` and
            safetensors weights, an `(open_clip model or its visual tower, model config dictionary)` pair, or a tower.
        language_model: hub id, folder or model; any causal LM whose logits are a plain linear head of its last state.
        tokenizer: of the language model; by default read from the language model's folder. Must be a fast one.
        pretrained: open_clip's tag of weights, or a safetensors file, for a tower given by model name.
        vision_feature_layer: hidden state(s) of the tower that the projector reads; -2 is the second-last block's.
        vision_feature_select_strategy: "default" leaves the class token out, "full" keeps it where there is one.
        chat_template: Jinja source; by default the tokenizer's own, made to take images, or else LLaVA-1.5's.
        resize_mode: how pictures become square: "shortest" side to size, then crop (open_clip's default); "longest"
            side to size, then pad; "squash". By default as the tower was trained. Cropping loses edges of documents.
        dtype: of the whole model; by default the language model's.

    Raises:
        UserError: a part cannot be found, has no safetensors weights or no fast tokenizer, cannot be held by LLaVA, or
            the whole cannot read a picture and go on from it.
    """
    language_model_name = (
        str(language_model) if isinstance(language_model, str | Path) else type(language_model).__name__
    )
    if tokenizer is None and isinstance(language_model, PreTrainedModel):
        tokenizer = language_model.config.name_or_path
        if not tokenizer:
            raise UserError(
                f"A {language_model_name} made in memory has no tokenizer of its own: give build(tokenizer=…)."
            )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = _load_tokenizer(tokenizer or language_model)
    if not isinstance(language_model, PreTrainedModel):
        language_model = _load_language_model(language_model, dtype)
    dtype = dtype or language_model.dtype

    vision_tower = _open_tower(tower, pretrained, vision_feature_layer)
    strategy = vision_feature_select_strategy if vision_tower.config.has_class_token else "full"
    _prepare_tokens(tokenizer, language_model)
    processor = _make_processor(vision_tower.config, tokenizer, strategy, chat_template, resize_mode)
    model = _join(vision_tower, language_model, processor, vision_feature_layer, dtype)
    _check_logits(model, language_model, language_model_name)
    _check_sees(model, processor, language_model_name)
    return model.eval(), processor


def load(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    is_trainable: bool = False,
) -> tuple[LlavaForConditionalGeneration | PeftModel, LlavaProcessor]:
    """Reads a LLaVA and, if given, an adapter trained on it.

    Args:
        path: a folder written by `save_pretrained` (ours or llava-hf's), a hub id, "miniworld", which comes with us, or
            "smol", once it was fetched.
        adapter: a PEFT adapter folder, or one that holds just a trained projector (`projector.safetensors`).
        dtype: by default the one it was saved in, or float32 on a CPU that has no instructions for that.
        device: where to; "auto" spreads the model over all devices there are.
        is_trainable: whether the adapter's weights shall go on training.

    Raises:
        UserError: there is no such checkpoint or adapter, it is not a LLaVA, weights are missing in it or left over, or
            the adapter was trained on another base.
    """
    source = resolve(path)
    config = _load_config(source, path)
    if config.model_type != "llava":
        raise UserError(
            f"{path} holds a model of type {config.model_type!r}, but a LLaVA (model_type 'llava') is needed. "
            f"To give a language model a vision tower, use mllm.build(tower, {str(path)!r})."
        )
    processor = _load_processor(source, path, config)
    model = _load_model(source, path, dtype, device)
    if model.config.text_config.pad_token_id is None:
        model.config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    # Kept for the cards of adapters trained from here on: an adapter loaded now may replace some of these weights.
    model.base_as_read = (str(path), _samples_if_whole(model))
    if adapter is not None:
        model = _load_adapter(model, processor, Path(adapter), path, is_trainable)
    return model, processor


def share_weights(model: nn.Module, of: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Lets a model hold those of its weights that equal `of` in the same memory, and returns its own by their names.

    For several adapters of one base at a time, each loaded as a model. Names are those of the base, whatever an adapter
    has put around its parts. For inference: what is trained in one would change in all.
    """
    own = {_name_in_base(name): parameter for name, parameter in model.named_parameters()}
    for name, parameter in own.items():
        there = None if of is None else of.get(name)
        if there is None or (there.dtype, there.device, there.shape) != (
            parameter.dtype,
            parameter.device,
            parameter.shape,
        ):
            continue
        if torch.equal(there, parameter):
            parameter.data = there.data
    return own


def _name_in_base(name: str) -> str:
    """A parameter's name without what PEFT puts around the module that holds it."""
    wraps = ("base_layer", "original_module")
    return ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part not in wraps)


def fingerprint(model: PreTrainedModel | PeftModel, *, with_projector: bool = False) -> str:
    """A short hash of what an adapter depends on.

    Covers kinds and sizes of the parts, and samples of the language model's input embedding and of the tower's first
    weights; `with_projector` also of the projector, which adapters may replace and studies rest on. Samples are cast to
    bfloat16, so that a model loaded in float32 and in bfloat16 has the same one.

    Raises:
        ValueError: the weights are not whole in this process (meta device, ZeRO-3 partitions): gather them first.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    text, vision = base.config.text_config, base.config.vision_config
    sizes = [[part.model_type, part.hidden_size, part.num_hidden_layers] for part in (text, vision)] + [
        text.vocab_size,
        vision.image_size,
        vision.patch_size,
    ]
    digest = hashlib.sha256(json.dumps(sizes).encode())
    projector = base.model.multi_modal_projector.parameters() if with_projector else ()
    embedding = base_module(base.get_input_embeddings()).weight
    for weight in (embedding, next(base.model.vision_tower.parameters()), *projector):
        if weight.is_meta or weight.numel() == 0:
            raise ValueError("fingerprint needs whole weights in this process; gather partitioned ones first.")
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 4096)]
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_base_card(
    folder: str | Path,
    model: PreTrainedModel | PeftModel,
    base_path: str | Path,
    processor: LlavaProcessor | None = None,
) -> None:
    """Writes into an adapter folder which base it was trained on (`base.json`); `load` refuses another one.

    A model that `load` read from `base_path` is known as it was read, before an adapter replaced anything; of any other
    model the base's weights are taken as they are, so write the card before they are trained.
    `processor` is the one trained with; by default that of the base.
    """
    processor = processor or load_processor(base_path)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    read_from, samples = getattr(base, "base_as_read", (None, None))
    card = {
        "base": str(base_path),
        "fingerprint": fingerprint(model),
        "parts": to_card(samples if samples and read_from == str(base_path) else base_samples(model)),
        "chat_template_sha": _sha(processor.chat_template),
        "special_tokens_in_text": getattr(processor, "special_tokens_in_text", "text"),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / BASE_CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_processor(path: str | Path) -> LlavaProcessor:
    """The processor of a checkpoint alone, without its model. Raises UserError as `load` does."""
    source = resolve(path)
    return _load_processor(source, path, _load_config(source, path))


def load_window(path: str | Path) -> int | None:
    """The most positions a checkpoint's language model has, told by its config alone; None: no bound is written."""
    config = _load_config(resolve(path), path)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


# ---- the vision tower ----------------------------------------------------------------------------------------------


def _open_tower(
    tower: str | Path | tuple[nn.Module, dict[str, Any]] | OpenClipVisionModel,
    pretrained: str | None,
    vision_feature_layer: int | list[int],
) -> OpenClipVisionModel:
    if isinstance(tower, OpenClipVisionModel):
        config = tower.config
        model_cfg = {"embed_dim": config.embed_dim, "vision_cfg": config.vision_cfg, "quick_gelu": config.quick_gelu}
        return wrap_visual(
            tower.visual, model_cfg, preprocess_cfg=config.preprocess_cfg, vision_feature_layer=vision_feature_layer,
            joined=config.joined or (), patch_size=config.patch_size,
        )  # fmt: skip
    if isinstance(tower, tuple):
        clip, given = tower
        visual, model_cfg = getattr(clip, "visual", clip), given.get("model_cfg", given)
        preprocess_cfg = given.get("preprocess_cfg")
    else:
        clip, model_cfg = _create_clip(str(tower), pretrained)
        visual, preprocess_cfg = clip.visual, None
    return wrap_visual(visual, model_cfg, preprocess_cfg=preprocess_cfg, vision_feature_layer=vision_feature_layer)


def _create_clip(name: str, pretrained: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """An open_clip model by name, hub name or folder, and its model config."""
    folder = Path(name).parent if Path(name).is_file() else Path(name)
    if folder.is_dir():
        if not (folder / "open_clip_config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise UserError(
                f"{folder}: expected open_clip_config.json and weights in safetensors format in this folder."
            )
        name = f"local-dir:{folder}"
    elif not name.startswith(("hf-hub:", "local-dir:")) and name not in open_clip.list_models():
        near = get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.3)
        raise UserError(
            f"No vision tower {name!r}: it is neither a folder nor 'hf-hub:owner/name' nor a model name of open_clip. "
            f"Nearest names: {', '.join(near) or 'none'}."
        )
    if pretrained and Path(pretrained).is_file() and Path(pretrained).suffix != ".safetensors":
        raise UserError(f"{pretrained}: weights are read from safetensors files only, to be safe from pickled code.")
    weights_config = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    if weights_config and weights_config.get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu"):
        raise UserError(
            f"The weights {pretrained!r} were trained with QuickGELU, which the tower {name!r} does not use: its "
            f"features would be silently off. Use {name + '-quickgelu'!r}."
        )
    try:
        clip = open_clip.create_model(name, pretrained=pretrained)
    except (RuntimeError, ValueError, OSError) as error:
        weights = f" with weights {pretrained!r}" if pretrained else ""
        raise UserError(f"open_clip could not make the tower {name!r}{weights}: {error}") from error
    return clip, open_clip.get_model_config(name)


# ---- the language model --------------------------------------------------------------------------------------------


def _load_language_model(name: str | Path, dtype: torch.dtype | None) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"Could not read a causal language model from {str(name)!r}: {_in_a_line(error)}") from error
    check_keys(f"The language model {str(name)!r}", type(model).__name__, info)
    return model


def _load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"Could not read a tokenizer from {str(name)!r}: {_first_line(error)} Give tokenizer=…"
        ) from error


def _prepare_tokens(tokenizer: PreTrainedTokenizerBase, language_model: PreTrainedModel) -> None:
    """Adds the image token, and a padding token of its own where there is none, and makes room for them.

    New rows become the mean of the old: an image token's row is never read, but its logit takes part in the softmax.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} is a slow tokenizer; labels need a fast one (it knows offsets).")
    if tokenizer.eos_token is None:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so answers could not end."
        )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # saved is what it was made with

    num_rows = language_model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_rows:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for module in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            with torch.no_grad():
                module.weight[num_rows:] = module.weight[:num_rows].float().mean(0).to(module.weight.dtype)
    language_model.config.pad_token_id = tokenizer.pad_token_id


# ---- the processor -------------------------------------------------------------------------------------------------


def _make_processor(
    vision: OpenClipVisionConfig,
    tokenizer: PreTrainedTokenizerBase,
    strategy: str,
    chat_template: str | None,
    resize_mode: ResizeMode | None,
) -> LlavaProcessor:
    side, preprocess = vision.image_size, vision.preprocess_cfg
    sizes = {
        "shortest": {"shortest_edge": side},
        "longest": {"max_height": side, "max_width": side},
        "squash": {"height": side, "width": side},
    }
    image_processor = CLIPImageProcessor(
        size=sizes[resize_mode or preprocess["resize_mode"]],
        crop_size={"height": side, "width": side},
        resample=PILImageResampling[preprocess["interpolation"].upper()],
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(vision.has_class_token),
        chat_template=_choose_template(tokenizer, chat_template),
    )
    ConversationEncoder(processor)  # refuses a chat template whose prompts are not how training texts begin
    return processor


def _choose_template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> str:
    """The template given, else the tokenizer's, wrapped to take images if it does not, else LLaVA-1.5's."""
    template = given or tokenizer.chat_template or CHAT_TEMPLATE
    if not isinstance(template, str):
        raise UserError(
            f"The tokenizer has several chat templates ({', '.join(template)}); give build(chat_template=…)."
        )
    for candidate in (template, FLATTEN_CONTENT + template):
        if _renders_images(tokenizer, candidate):
            return candidate
    raise UserError(
        "The chat template loses the picture of a user's message or the text of an answer. Give build(chat_template=…) "
        "one that writes <image> for an item of type 'image'."
    )


def _renders_images(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
    ]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except (TypeError, TemplateError):
        return False
    return text.count(IMAGE_TOKEN) == 1 and "What?" in text and "That." in text and "type" not in text


# ---- the whole -----------------------------------------------------------------------------------------------------


def _join(
    tower: OpenClipVisionModel,
    language_model: PreTrainedModel,
    processor: LlavaProcessor,
    vision_feature_layer: int | list[int],
    dtype: torch.dtype,
) -> LlavaForConditionalGeneration:
    decoder, head = language_model.base_model, language_model.get_output_embeddings()
    text_config = language_model.config
    if text_config.tie_word_embeddings and not hasattr(decoder, "embed_tokens"):
        # LLaVA ties its head to a module of this name; where the embedding has another, the head gets its own weights.
        text_config.tie_word_embeddings = False
        head = deepcopy(head)
    vision = tower.config
    num_tokens = (vision.image_size // vision.patch_size) ** 2
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_index=processor.image_token_id,
        image_seq_length=num_tokens + (processor.vision_feature_select_strategy == "full" and vision.has_class_token),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    with init_empty_weights():
        model = LlavaForConditionalGeneration(config)
    places = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.model.vision_tower = tower
    model.model.language_model = decoder
    model.lm_head = head
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    # What save_pretrained writes is read into LLaVA as transformers makes it, which knows no head with a bias.
    held = {name: tensor.shape for name, tensor in model.state_dict().items()}
    homeless = [name for name in held | places if held.get(name) != places.get(name)]
    if homeless:
        raise UserError(
            f"LLaVA cannot hold the {type(language_model).__name__} (model_type {text_config.model_type!r}): "
            f"{few(homeless)} would not come back from a saved folder. Choose another language model."
        )
    model.generation_config = language_model.generation_config
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.to(dtype)


def _check_logits(model: LlavaForConditionalGeneration, language_model: PreTrainedModel, name: str) -> None:
    """Some language models add a bias, a cap or a scale to their logits, which LLaVA's plain head would drop."""
    device = language_model.device
    input_ids = torch.arange(4, device=device)[None]
    # Magnified, because a cap does nothing to logits as small as those of fresh weights.
    hooks = [
        head.register_forward_hook(lambda _module, _args, logits: logits * 1024)
        for head in {language_model.get_output_embeddings(), model.lm_head}
    ]
    try:
        with torch.no_grad():
            expected, got = language_model.eval()(input_ids).logits / 1024, model.eval()(input_ids).logits / 1024
    except Exception as error:  # whatever a language model of another kind stumbles over
        raise _cannot_see(model, name, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not torch.allclose(expected, got, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"LLaVA cannot hold the language model {name!r} (model_type {language_model.config.model_type!r}): its "
            "logits are not a plain linear map of its last hidden state "
            f"(largest difference {(expected - got).abs().max():.3g}). Choose another one."
        )


def _check_sees(model: LlavaForConditionalGeneration, processor: LlavaProcessor, name: str) -> None:
    """Tries one picture and one token after it: what takes text alone may fail at the first sample, or not look."""
    side = model.config.vision_config.image_size
    pictures = [Image.new("RGB", (side, side), colour) for colour in ("white", "black")]
    try:
        inputs = processor(images=pictures[:1], text=[IMAGE_TOKEN], return_tensors="pt").to(model.device)
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(model.device)
        with torch.no_grad():
            output = model.eval()(**inputs, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            white, black = model.get_image_features(pixels).pooler_output
    except Exception as error:
        raise _cannot_see(model, name, error) from error
    if torch.equal(white, black):
        raise UserError("A white and a black picture are the same to the vision tower: it sees nothing. Take another.")


def _cannot_see(model: LlavaForConditionalGeneration, name: str, error: Exception) -> UserError:
    return UserError(
        f"The language model {name!r} (model_type {model.config.text_config.model_type!r}) cannot read a picture's "
        f"embeddings and go on from them: {type(error).__name__}: {_in_a_line(error)} Choose another one."
    )


# ---- reading a checkpoint ------------------------------------------------------------------------------------------


def resolve(path: str | Path) -> str:
    """The folder or hub id behind a name. Raises UserError for a base of ours that is not there."""
    if str(path) in fetched.NAMES:
        return str(fetched.find(str(path)))
    if str(path) != MINIWORLD:
        return str(path)
    folder = resources.files("mllm") / "assets" / MINIWORLD
    if not (folder / "config.json").is_file():
        raise UserError(
            f"This installation lacks the embedded base {MINIWORLD!r} ({folder}): install the package again."
        )
    return str(folder)


def _load_config(source: str, path: str | Path) -> PreTrainedConfig:
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UserError(
            f"No checkpoint in {path}: the folder has no config.json. Expected one written by save_pretrained."
        )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"No such checkpoint: {path}. It is neither a folder written by save_pretrained nor a hub id that can be "
            f"reached, nor one of {', '.join((MINIWORLD, *fetched.NAMES))}. ({_first_line(error)})"
        ) from error


def _load_model(
    source: str, path: str | Path, dtype: torch.dtype | str | None, device: str | torch.device | None
) -> LlavaForConditionalGeneration:
    try:
        model, info = LlavaForConditionalGeneration.from_pretrained(
            source,
            dtype=dtype or "auto",
            device_map=device,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name: transformers' own error is a table of all keys
        )
    except OSError as error:
        raise UserError(
            f"The checkpoint {path} has no weights in safetensors format. ({_first_line(error)})"
        ) from error
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"The weights of the checkpoint {path} cannot be read: {_in_a_line(error)}") from error
    check_keys(f"The checkpoint {path}", "LLaVA", info)
    if dtype is None and model.dtype != suitable(model.dtype):
        model = model.to(suitable(model.dtype))
    return model.eval()


def _load_processor(source: str, path: str | Path, config: PreTrainedConfig) -> LlavaProcessor:
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The checkpoint {path} has no processor (tokenizer and image processor): {_first_line(error)}"
        ) from error
    if not isinstance(processor, LlavaProcessor):
        raise UserError(
            f"The processor of {path} is a {type(processor).__name__}; expected LLaVA's with its tokenizer."
        )
    if not processor.tokenizer.is_fast:
        raise UserError(f"The tokenizer of {path} is a slow one; labels need a fast one (it knows offsets).")
    if processor.image_token_id != config.image_token_id:
        raise UserError(
            f"{path}: the processor writes {processor.image_token!r} as token {processor.image_token_id}, but the "
            f"model looks for image token {config.image_token_id}. Save both together."
        )
    if processor.patch_size is None:  # folders of llava-hf's first year leave this to the model's config
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(config.vision_config.model_type == "clip_vision_model")
    processor.chat_template = processor.chat_template or CHAT_TEMPLATE
    processor.tokenizer.padding_side = "left"
    ConversationEncoder(processor)  # refuses a chat template whose prompts are not how training texts begin
    return processor


# ---- adapters ------------------------------------------------------------------------------------------------------


def _load_adapter(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, adapter: Path, path: str | Path, is_trainable: bool
) -> LlavaForConditionalGeneration | PeftModel:
    has_peft, has_projector = (adapter / "adapter_config.json").is_file(), (adapter / PROJECTOR_FILE).is_file()
    if not has_peft and not has_projector:
        raise UserError(
            f"No such adapter: {adapter} holds neither adapter_config.json (a PEFT adapter) nor {PROJECTOR_FILE}."
        )
    _check_base_card(model, processor, adapter, path)
    if has_projector:
        _load_projector(model, adapter, path, is_trainable)
    return load_peft(model, adapter, path, is_trainable=is_trainable) if has_peft else model


def _check_base_card(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, adapter: Path, path: str | Path
) -> None:
    if not (adapter / BASE_CARD).is_file():
        return
    try:
        card = json.loads((adapter / BASE_CARD).read_text(encoding="utf-8"))
        base, template = card["base"], card["chat_template_sha"]
        if "parts" in card and model.base_as_read[1] is None:
            warnings.warn(f"Some weights of {path} lie on disk: not compared with {adapter / BASE_CARD}.", stacklevel=4)
            told_apart = None
        elif "parts" in card:
            told_apart = difference(card["parts"], model.base_as_read[1])
        else:
            warnings.warn(
                f"{adapter / BASE_CARD} is of an earlier release: only the embedding and the tower's first weights "
                "are compared with the base.",
                stacklevel=4,
            )
            is_same = card["fingerprint"] == fingerprint(model)
            told_apart = None if is_same else f"fingerprint is {fingerprint(model)} instead of {card['fingerprint']}"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{adapter / BASE_CARD} is no base card ({type(error).__name__}: {_first_line(error)}). Take the file as "
            "it was written with the adapter."
        ) from error
    if told_apart:
        raise UserError(
            f"The adapter {adapter} was trained on the base {base}, but the base given is {path}: its {told_apart}. "
            f"Load it on {base}."
        )
    if template != _sha(processor.chat_template):
        raise UserError(
            f"The adapter {adapter} was trained on the base {base} with another chat template than that of "
            f"{path}: its answers would be out of form. Load it on the base it was trained on."
        )
    processor.special_tokens_in_text = card.get("special_tokens_in_text", "text")


def _samples_if_whole(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]] | None:
    """Samples of the base's weights; None where `device="auto"` has left some on disk."""
    return None if any(parameter.is_meta for parameter in model.parameters()) else base_samples(model)


def _load_projector(model: LlavaForConditionalGeneration, adapter: Path, path: str | Path, is_trainable: bool) -> None:
    projector = model.model.multi_modal_projector
    try:
        projector.load_state_dict(load_file(adapter / PROJECTOR_FILE))
    except (RuntimeError, SafetensorError) as error:
        raise _other_base(adapter, path, error) from error
    projector.requires_grad_(is_trainable)


def read_adapter_config(adapter: Path) -> PeftConfig:
    """The PEFT config of an adapter folder. Raises UserError for one that this release of PEFT does not wholly know."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Unexpected keyword arguments")
            return PeftConfig.from_pretrained(str(adapter))
    except UserError as error:
        raise UserError(f"{adapter / 'adapter_config.json'}: {error}") from error
    except KeyError as error:
        raise UserError(f"{adapter / 'adapter_config.json'}: no method of PEFT's is called {error}.") from error
    except (TypeError, ValueError, OSError, UserWarning) as error:
        raise UserError(f"{adapter / 'adapter_config.json'} cannot be used: {_in_a_line(error)}") from error


def load_peft(model: PreTrainedModel, adapter: Path, path: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """A PEFT adapter put on a model that was read from `path`, whole.

    Raises:
        UserError: the folder's settings or weights are not all known to the model, weights are missing or of other
            shapes, or the adapter's start changes the base.
    """
    config = read_adapter_config(adapter)
    if not any((adapter / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise UserError(f"The adapter {adapter} has no weights: adapter_model.safetensors is not there.")
    config.inference_mode = not is_trainable
    before = _samples_if_whole(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below, with those left over
            adapted = PeftModel.from_pretrained(model, str(adapter), config=config, is_trainable=is_trainable)
        weights = load_peft_weights(str(adapter), device="cpu")
        result = set_peft_model_state_dict(adapted, weights)  # anew, for its account of what was read
    except UserError:
        raise
    except KeyError as error:
        raise _other_base(adapter, path, f"it lacks {error}.") from error
    except (RuntimeError, ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        raise _other_base(adapter, path, error) from error
    _check_adapter_keys(adapted, result, adapter, path)
    if before is not None:
        held = {name.removeprefix("base_model.model.") for name in weights}
        check_start_keeps_base(config, before, adapted, allowed=held)
    return adapted


def _check_adapter_keys(model: PeftModel, result: Any, adapter: Path, path: str | Path) -> None:
    """Raises UserError where the adapter has weights without a place, or places are left without weights."""
    tensors = model.state_dict()
    places = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    places -= {tensor.data_ptr() for name, tensor in tensors.items() if name not in result.missing_keys}  # tied
    missing = [
        name
        for name in result.missing_keys
        if tensors[name].data_ptr() in places and ".original_module." not in name  # PEFT counts those with bias="all"
    ]
    faults = [f"missing adapter keys: {few(missing)}"] * bool(missing)
    faults += [f"adapter keys without a place: {few(result.unexpected_keys)}"] * bool(result.unexpected_keys)
    if faults:
        raise _other_base(adapter, path, f"{'; '.join(faults)}.")


def _other_base(adapter: Path, path: str | Path, error: Exception | str) -> UserError:
    """The weights do not fit; who trained them on what is in the base card, or else in PEFT's config."""
    known = {}
    for name in ("adapter_config.json", BASE_CARD):
        if (adapter / name).is_file():
            known |= json.loads((adapter / name).read_text(encoding="utf-8"))
    base = known.get("base") or known.get("base_model_name_or_path") or "unknown"
    return UserError(
        f"The adapter {adapter} does not fit the base {path}; it was trained on {base}. {_in_a_line(error)}"
    )


def _in_a_line(error: Exception | str) -> str:
    """A message of several lines in one, cut where it becomes a list."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:400]} …"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
