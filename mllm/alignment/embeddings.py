"""Where a sample stands among tasks: an embedding of its question and picture, never of its answer.

B batch, S sequence, D width, N samples, M width of an embedding. All embeddings are fp32 and of unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import open_clip
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from mllm.alignment.data import AlignmentData
from mllm.alignment.routes import prompt_mask, unwrapped
from mllm.alignment.tail import run
from mllm.common.errors import UserError
from mllm.data.conversation import Conversation
from mllm.data.images import crop_thin, open_image

CLIP_PREFIX, SENTENCE_PREFIX = "clip:", "sentence-transformers:"


def embed(
    name: str,
    model: nn.Module,
    data: AlignmentData,
    conversations: Sequence[Conversation] | None = None,
    *,
    rows: Sequence[int] | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Embeddings [N, M] of the rows by the embedder of that name.

    name: "base", the model's own last hidden state; "clip:NAME[,WEIGHTS]", an open_clip model; or
        "sentence-transformers:NAME", the text alone (an extra package). The last two read `conversations`.

    Raises UserError for another name, where conversations are needed and not given, or the package is missing.
    """
    if name == "base":
        return base_embeddings(model, data, rows=rows, batch_size=batch_size)
    if not name.startswith((CLIP_PREFIX, SENTENCE_PREFIX)):
        raise UserError(f"embedding {name!r}: expected base, {CLIP_PREFIX}NAME[,WEIGHTS] or {SENTENCE_PREFIX}NAME.")
    if conversations is None:
        raise UserError(f"embedding {name!r} reads questions and pictures; give the conversations, or use 'base'.")
    conversations = conversations if rows is None else [conversations[row] for row in rows]
    if name.startswith(SENTENCE_PREFIX):
        return sentence_embeddings(name.removeprefix(SENTENCE_PREFIX), conversations)
    architecture, _, weights = name.removeprefix(CLIP_PREFIX).partition(",")
    try:
        clip, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=weights or None)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"open_clip could not make {architecture!r}: {error}") from error
    tokenizer = open_clip.get_tokenizer(architecture)
    return clip_embeddings(clip.eval(), preprocess, tokenizer, conversations, batch_size=batch_size)


@torch.no_grad()
def base_embeddings(
    model: nn.Module, data: AlignmentData, *, rows: Sequence[int] | None = None, batch_size: int = 16
) -> Tensor:
    """The base's last hidden state, adapter switched off, averaged over the prompt's real tokens, pictures included."""
    rows = range(len(data)) if rows is None else rows
    pooled, states = [], []
    hook = unwrapped(model).get_decoder().register_forward_hook(lambda _, __, output: states.append(output[0]))
    try:
        with _adapter_off(model):
            for start in range(0, len(rows), batch_size):
                inputs, labels_BS, _ = data.batch(rows[start : start + batch_size])
                run(model, inputs, None)
                hidden_BSD = states.pop().float()
                prompt_BS1 = prompt_mask(labels_BS, inputs["attention_mask"])[..., None].to(hidden_BSD)
                pooled.append(((hidden_BSD * prompt_BS1).sum(1) / prompt_BS1.sum(1)).cpu())
    finally:
        hook.remove()
    return F.normalize(torch.cat(pooled), dim=1) if pooled else torch.zeros(0, 1)


def centred(embeddings_NM: Tensor, mean_M: Tensor | None = None) -> Tensor:
    """Embeddings without what all share, again of unit length.

    Pooled states of one model lie in a narrow cone; their differences tell tasks apart. `mean_M`: of other samples,
    such as the training ones.
    """
    mean_M = embeddings_NM.mean(0) if mean_M is None else mean_M
    return F.normalize(embeddings_NM - mean_M, dim=1)


def _adapter_off(model: nn.Module) -> AbstractContextManager:
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


@torch.no_grad()
def clip_embeddings(
    clip: nn.Module,
    preprocess: object,
    tokenizer: object,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 16,
) -> Tensor:
    """The mean of a row's picture embeddings, and the question's, each of unit length, side by side.

    A row without pictures has zeros for them.
    """
    rows = []
    for start in range(0, len(conversations), batch_size):
        asked = conversations[start : start + batch_size]
        text_BM = F.normalize(clip.encode_text(tokenizer([row.question for row in asked])).float(), dim=1)
        picture_BM = torch.zeros_like(text_BM)
        for number, row in enumerate(asked):
            if row.images:
                pixels = torch.stack([preprocess(crop_thin(open_image(path, where=row.where))) for path in row.images])
                picture_BM[number] = F.normalize(clip.encode_image(pixels).float(), dim=1).mean(0)
        rows.append(F.normalize(torch.cat([picture_BM, text_BM], dim=1), dim=1))
    return torch.cat(rows)


def sentence_embeddings(name: str, conversations: Sequence[Conversation]) -> Tensor:
    """The last question by a sentence-transformers model; pictures are not seen."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(f"embedding by {name!r} needs the package sentence-transformers; install it.") from None
    encoder = SentenceTransformer(name, trust_remote_code=False)
    vectors = encoder.encode([row.question for row in conversations], convert_to_tensor=True, show_progress_bar=False)
    return F.normalize(vectors.float().cpu(), dim=1)
