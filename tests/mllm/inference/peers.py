"""The smallest vision-language models of other families, random weights and all, as `save_pretrained` writes them."""

from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from tests.tiny import tiny_tokenizer

# Each family marks a picture in a way of its own.
QWEN2_TEMPLATE = """\
{%- for message in messages -%}<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
IDEFICS3_TEMPLATE = """\
<s>{%- for message in messages -%}{{ message.role | capitalize }}:
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<image>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
<end_of_utterance>
{% endfor -%}{%- if add_generation_prompt -%}Assistant:{%- endif -%}"""
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tokenizer_with(*tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    return tokenizer


def text_config(tokenizer: PreTrainedTokenizerFast) -> dict:
    ends = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return TEXT | ends | {"vocab_size": len(tokenizer)}


def write_qwen2_vl(folder: str | Path) -> Path:
    """Pictures of any size, positions in three dimensions."""
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = tokenizer_with(*marks)
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(list(marks)), strict=True))
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config=text_config(tokenizer) | {"rope_parameters": rope},
        vision_config=tower,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    pixels = {"patch_size": 4, "min_pixels": 64, "max_pixels": 4096}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels), chat_template=QWEN2_TEMPLATE
    )
    return write(Qwen2VLForConditionalGeneration, config, processor, folder)


def write_idefics3(folder: str | Path) -> Path:
    """Pictures cut into tiles, each told of in the text."""
    marks = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tokenizer = tokenizer_with(*marks)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        text_config=text_config(tokenizer) | {"model_type": "llama"},
        vision_config=tower | {"image_size": 16, "patch_size": 4},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    image_processor = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=IDEFICS3_TEMPLATE)
    return write(Idefics3ForConditionalGeneration, config, processor, folder)


def write(kind: type, config: object, processor: object, folder: str | Path) -> Path:
    """Larger than usual weights, so that each prompt gets a reply of its own."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "layers" in name:
                weight.mul_(8)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


FAMILIES = {"qwen2_vl": write_qwen2_vl, "idefics3": write_idefics3}
