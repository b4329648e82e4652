"""The smallest objects that are still the real thing: a LLaVA of 65 thousand weights, its processor, its pictures.

Everything is made in memory from a seed, in fp32. Pictures become 24 pixels a side, in 9 patches; width 32, 2 layers.
"""

from pathlib import Path

import torch
from open_clip import CLIP
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm.build import build

TOWER_CFG = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 8, "image_size": 24},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2, "vocab_size": 64, "context_length": 8},
}
TOKENIZER_TEXT = [
    "USER: What colour is the square? ASSISTANT: red",
    "USER: How many cells are there? ASSISTANT: three",
    "USER: What is the total of the receipt? ASSISTANT: 12.50",
    "USER: Is there a circle left of the square? ASSISTANT: yes no",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens with <s>, </s> and <pad>; without <image>, which `build` adds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_language_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tower(seed: int = 0) -> tuple[CLIP, dict]:
    """A whole open_clip model and its config, as `build` takes it."""
    torch.manual_seed(seed)
    return CLIP(**TOWER_CFG).eval(), TOWER_CFG


def tiny_llava(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tower, language_model = tiny_tower(seed), tiny_language_model(seed)
    torch.manual_seed(seed)
    return build(tower, language_model, tokenizer=tiny_tokenizer())


def tiny_image(colour: str = "red", size: int = 40) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def write_tiny_llava(folder: str | Path, seed: int = 0) -> Path:
    """Model and processor as `save_pretrained` writes them."""
    model, processor = tiny_llava(seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
