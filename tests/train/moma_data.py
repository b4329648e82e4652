"""An image tokenizer of four tokens and early-fusion stages of a few steps, on a few dozen scenes of miniworld."""

from pathlib import Path

import torch

from mllm.moma.image_tokens import ImageTokenizer, normalise_codes

FIELDS = "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2}"


def write_image_tokenizer(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer.small(image_size=96, side=2, codebook_size=16, width=32, patch=48)
    normalise_codes(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def write_moma_config(folder: Path, **settings: str) -> Path:
    """Five steps of a 2t2i model; settings replace whole sections."""
    write_image_tokenizer(folder / "tokenizer")
    sections = {
        "stage": "pretrain_moma",
        "model": f"{{preset: 2t2i, image_tokenizer: '{folder}/tokenizer', fields: {FIELDS}}}",
        "data": f"{{miniworld: 60, held_out: 8, length: 64, image_share: 0.5, cache: '{folder}/rows'}}",
        "optim": "{lr: 1.0e-2}",
        "run": f"{{output_dir: '{folder}/run', steps: 5, batch_size: 8, micro_batch_size: 2, log_every: 1}}",
        "deepspeed": "{zero: 2}",
        "report": "{enabled: false}",
    } | settings
    path = folder / "moma.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in sections.items()), encoding="utf-8")
    return path
