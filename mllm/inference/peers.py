"""Other people's vision-language models, to stand in the same table: whatever transformers can load and chat with.

They are asked by their own processor and chat template, as their authors ask them. B batch, S sequence.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mllm.build import load_peft, resolve
from mllm.common.errors import UserError
from mllm.common.names import check_keys
from mllm.common.precision import suitable
from mllm.data.conversation import Conversation, Turn
from mllm.data.images import open_image
from mllm.data.special_tokens import SpecialTokens
from mllm.data.template import PROBE, SYSTEM_PROBE, has_system_place, into_first_question

_MEAN_COLOUR = (0.5, 0.5, 0.5)  # where an image processor tells none


def is_peer(path: str | Path) -> bool:
    """Whether a folder or hub id holds a vision-language model that transformers knows, other than a LLaVA."""
    try:
        config = AutoConfig.from_pretrained(resolve(path), trust_remote_code=False)  # the hub is not asked for ours
    except (OSError, ValueError):
        return False  # mllm.build.load says in words what is wrong
    return config.model_type != "llava" and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_peer(
    path: str | Path, *, adapter: str | Path | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Reads a vision-language model and its processor and, if given, a PEFT adapter of any method.

    Raises:
        UserError: something cannot be read, the model writes no text behind its prompt, it has no chat template, or the
            adapter does not fit it.
    """
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        model, info = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype="auto",
            device_map=device,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"Could not read the vision-language model {path}: {_first_line(error)}") from error
    check_keys(f"The checkpoint {path}", type(model).__name__, info)
    if model.dtype != suitable(model.dtype):
        model = model.to(suitable(model.dtype))
    if model.config.is_encoder_decoder:
        raise UserError(f"{path} is an encoder-decoder ({model.config.model_type}); only decoders can be asked here.")
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        raise UserError(f"{path} has no chat template, so nobody can tell how to ask it. Save one with its processor.")
    if adapter is None:
        return model.eval(), processor
    return load_peft(model, Path(adapter), path).eval(), processor


class PeerPrompts:
    """Questions as a model's own chat template and processor put them; see `mllm.inference.generate.Prompts`."""

    ends: Sequence[int] = ()

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self.special = SpecialTokens(
            processor.tokenizer, self._written(), image_token=getattr(processor, "image_token", None)
        )

        asked = [{"type": "text", "text": PROBE}]
        said = [{"type": "text", "text": SYSTEM_PROBE}]
        self._has_system_place = has_system_place(self._try_rendering, said, asked)

    def _written(self) -> list[str]:
        """What the template writes around a question with a picture."""
        content = [{"type": "image"}, {"type": "text", "text": PROBE}]
        return list(filter(None, [self._try_rendering([{"role": "user", "content": content}])]))

    def _try_rendering(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception:  # a Jinja template raises anything on content and roles it does not know
            return None

    def __call__(self, conversations: Sequence[Conversation], *, blank: bool = False) -> Mapping[str, Tensor]:
        """Whatever the model's forward takes, left-padded; `input_ids` and `attention_mask` `[B, S]` among it.

        `blank` fills every picture with the mean colour and leaves its size, so that as many tokens stand for it.
        Raises UserError or `ImageError`, naming the row.
        """
        return self.processor.apply_chat_template(
            [self._messages(conversation, blank) for conversation in conversations],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )

    def _messages(self, conversation: Conversation, blank: bool) -> list[dict[str, Any]]:
        """Turns up to the last question, pictures in the places of their marks."""
        images = [open_image(path, where=conversation.where) for path in conversation.images]
        waiting = iter(self._emptied(image) if blank else image for image in images)
        turns = conversation.turns[:-1] if conversation.turns[-1].role == "assistant" else conversation.turns
        turns = turns if self._has_system_place else into_first_question(turns)
        return [{"role": turn.role, "content": self._parts(turn, waiting)} for turn in turns]

    def _parts(self, turn: Turn, images: Iterator[Image.Image]) -> list[dict[str, Any]]:
        """The line breaks LLaVA's records put around a picture are dropped: each template has a habit of its own.

        What processors do between template and tokenizer is theirs, so text that spells a token is parted instead.
        """
        first, *others = (self.special.spelt(text.strip()) for text in turn.between_pictures)
        parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
        for text in others:
            parts += [{"type": "image", "image": next(images)}, {"type": "text", "text": text}]
        return [part for part in parts if part["type"] == "image" or part["text"]]

    def _emptied(self, image: Image.Image) -> Image.Image:
        mean = getattr(self.processor.image_processor, "image_mean", None) or _MEAN_COLOUR
        return Image.new("RGB", image.size, tuple(round(255 * channel) for channel in mean))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
