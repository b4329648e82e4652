"""Pictures from words and words from pictures, by a trained Moma model; causal routing only, with the KV cache.

    model, processor = load_moma("runs/moma/model")
    picture = draw(model, processor, ["a scene: red ball at the top"])[0]
    words = describe(model, processor, [picture])[0]

N prompts, S tokens so far, V vocabulary, P codes of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from mllm.common.errors import UserError
from mllm.inference.generate import WholeSettings, evaluating, sampling
from mllm.moma.modeling import MomaForCausalLM
from mllm.moma.processor import MomaProcessor

PROMPTS_AT_ONCE = 32


def load_moma(folder: str | Path, device: str | None = None) -> tuple[MomaForCausalLM, MomaProcessor]:
    """A model and both its tokenizers from one folder, in evaluation. Raises UserError for a folder without them."""
    processor = MomaProcessor.from_pretrained(folder)
    model = MomaForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    processor.check(model.config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor.image_tokenizer.model.to(device)
    return model.to(device), processor


class WholePictures(LogitsProcessor):
    """Allows only what can follow: after a begin of picture exactly P codes and the end; outside no code and no end.

    `may_begin` says whether a picture may begin at all. Needs nothing but the ids, so it holds for prompts that end
    within a picture, and for every kind of decoding.
    """

    def __init__(self, processor: MomaProcessor, *, may_begin: bool = True) -> None:
        self.begin, self.end, self.may_begin = processor.begin_image_id, processor.end_image_id, may_begin
        self.codes = slice(
            processor.image_token_start, processor.image_token_start + processor.image_tokenizer.codebook_size
        )
        self.num_tokens = processor.image_tokenizer.num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        since_begin_N = self._since(input_ids, self.begin)
        is_inside_N = since_begin_N < self._since(input_ids, self.end)
        is_full_N = since_begin_N >= self.num_tokens
        allowed_NV = torch.zeros_like(scores, dtype=torch.bool)
        allowed_NV[:] = ~is_inside_N[:, None]
        allowed_NV[:, self.codes] = (is_inside_N & ~is_full_N)[:, None]
        allowed_NV[:, self.end] = is_inside_N & is_full_N
        allowed_NV[:, self.begin] = ~is_inside_N & self.may_begin
        return scores.masked_fill(~allowed_NV, -torch.inf)

    @staticmethod
    def _since(input_ids: Tensor, marker: int) -> Tensor:
        """[N] tokens after the last marker of each row; more than there are tokens where it has none."""
        length = input_ids.shape[1]
        place_S = torch.arange(length, device=input_ids.device)
        last_N = torch.where(input_ids == marker, place_S, -2).max(1).values
        return length - 1 - last_N


class CountTokens(LogitsProcessor):
    """Moves a bar by one for each row whenever a token is generated; scores stay as they are."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.bar.update(len(input_ids))
        return scores


def leaves_room(model: MomaForCausalLM, processor: MomaProcessor, caption: str) -> bool:
    """Whether a picture of the caption fits behind it, among the model's positions."""
    prompt = len(processor.open_ids([caption])) + 1  # the begin of a picture
    return prompt + processor.image_tokenizer.num_tokens <= model.config.max_position_embeddings


def draw(
    model: MomaForCausalLM,
    processor: MomaProcessor,
    captions: Sequence[str],
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> list[Image.Image]:
    """A picture for each caption, its codes sampled.

    Args:
        guidance: above 1, weight of the caption against the model's pictures without one (classifier-free guidance,
            2207.12598): it takes training documents of pictures alone, and twice the time.
        temperature: 0 takes the most probable code.
        top_k: codes to choose among; 0 all.
        seed: of sampling; figures depend on how many captions go together.
        progress: show how many codes are drawn, their rate and the remaining time.

    Raises UserError where the model's experts do not choose causally, and for a caption that leaves no room.
    """
    for caption in captions:
        if not leaves_room(model, processor, caption):
            raise UserError(f"Beside a picture the model does not read as long a caption as this: {caption!r}")
    pictures, num_codes = [], processor.image_tokenizer.num_tokens
    torch.manual_seed(seed)
    with tqdm(total=len(captions) * num_codes, unit=" codes", desc="drawing", disable=not progress) as bar:
        processors = LogitsProcessorList([WholePictures(processor), CountTokens(bar)])
        for start in range(0, len(captions), PROMPTS_AT_ONCE):
            opened = [processor.open_ids([caption]) for caption in captions[start : start + PROMPTS_AT_ONCE]]
            ids, mask = _left_padded([[*ids, processor.begin_image_id] for ids in opened], model.config.pad_token_id)
            settings = {"min_new_tokens": num_codes, "max_new_tokens": num_codes} | sampling(temperature, top_k)
            output = _generate(model, ids, mask, processors, settings | _guidance(guidance, processor, rows=len(ids)))
            codes_NP = output[:, ids.shape[1] :] - processor.image_token_start
            pictures += processor.image_tokenizer.decode(codes_NP)
    return pictures


def describe(
    model: MomaForCausalLM,
    processor: MomaProcessor,
    pictures: Sequence[Image.Image],
    *,
    max_new_tokens: int = 80,
    progress: bool = False,
) -> list[str]:
    """A text for each picture, word by word the most probable. Raises UserError as `draw` does."""
    texts = []
    starts = range(0, len(pictures), PROMPTS_AT_ONCE)
    for start in tqdm(starts, unit=" batches", desc="describing", disable=not progress):
        codes_NP = processor.image_tokenizer.encode(pictures[start : start + PROMPTS_AT_ONCE])
        ids = torch.tensor([processor.open_ids([codes_P]) for codes_P in codes_NP], device=model.device)
        # Of a model that also knows documents of a picture alone, a word is asked all the same.
        settings = {"min_new_tokens": 1, "max_new_tokens": max_new_tokens} | sampling(0)
        whole = LogitsProcessorList([WholePictures(processor, may_begin=False)])
        output = _generate(model, ids, torch.ones_like(ids), whole, settings)
        texts += [processor.text(row) for row in output[:, ids.shape[1] :]]
    return texts


def _generate(
    model: MomaForCausalLM, ids: Tensor, mask: Tensor, processors: LogitsProcessorList, settings: dict[str, Any]
) -> Tensor:
    """By these settings alone; of the folder's own generation config nothing is taken."""
    config = model.config
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    without = {key: settings.pop(key).to(model.device) for key in ("negative_prompt_ids",) if key in settings}
    with evaluating(model):
        return model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=processors,
            generation_config=WholeSettings(**settings, **ends),
            **without,
        )


def _guidance(weight: float, processor: MomaProcessor, *, rows: int) -> dict[str, Any]:
    """What lets a picture without a caption count against; nothing at weight 1."""
    if weight == 1:
        return {}
    bare = [[processor.tokenizer.bos_token_id, processor.begin_image_id]] * rows
    return {"guidance_scale": weight, "negative_prompt_ids": torch.tensor(bare)}


def _left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [N, S]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
