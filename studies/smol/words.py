"""The projector's start, without the language model: picture tokens near the embeddings of the words said of it.

A picture's caption and short answers name what is in it. Tokens are compared with the language model's own input
embeddings; the words that any of a picture's tokens is nearest to are to be those that are said. It takes a minute, and
the language model then meets directions that it knows.
"""

import math
import re
from collections import Counter, defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from studies.smol.data import Branch
from studies.smol.training import Learner

STEPS, PICTURES, RATE, SHARPNESS = 400, 64, 1e-3, 20.0
COMMON = 0.15  # a word said of more pictures than this share tells nothing


def said(branches: list[Branch], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Picture -> first tokens of the words said of it in captions and answers, but the commonest and the short."""
    words: dict[str, set[int]] = defaultdict(set)
    for branch in branches:
        if not branch.picture or branch.source in ("deepform", "fara_forms", "wtq_tables", "miniworld"):
            continue
        for word in re.findall(r"[a-z]{3,}", tokenizer.decode(branch.ids[-branch.answer : -1]).lower()):
            words[branch.picture].add(tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0])
    counts = Counter(token for tokens in words.values() for token in tokens)
    kept = {p: [t for t in sorted(tokens) if counts[t] <= COMMON * len(words)] for p, tokens in words.items()}
    return {picture: tokens for picture, tokens in kept.items() if tokens}


def start_projector(
    learner: Learner, branches: list[Branch], tokenizer: PreTrainedTokenizerBase, steps: int = STEPS
) -> float:
    """Trains the projector alone; returns the last loss, in nats a word."""
    targets = said(branches, tokenizer)
    vocabulary = sorted({token for tokens in targets.values() for token in tokens})
    place = {token: index for index, token in enumerate(vocabulary)}
    table = learner.model.get_input_embeddings().weight.detach().float()
    words = table[vocabulary] - table.mean(0)
    size = words.norm(dim=1).mean()
    optimizer = torch.optim.AdamW(learner.projector.parameters(), lr=RATE, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    pictures, loss = sorted(targets), torch.tensor(0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = [pictures[i] for i in torch.randint(len(pictures), (PICTURES,), generator=generator)]
        tokens: Tensor = learner.projector(learner.features(chosen))
        near = SHARPNESS * F.normalize(tokens, dim=-1) @ F.normalize(words, dim=-1).T
        logits = near.logsumexp(dim=1) - math.log(tokens.shape[1])
        wanted = torch.zeros_like(logits)
        for row, picture in enumerate(chosen):
            wanted[row, [place[token] for token in targets[picture]]] = 1 / len(targets[picture])
        loss = F.cross_entropy(logits, wanted)
        (loss + (tokens.norm(dim=-1) / size - 1).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()
