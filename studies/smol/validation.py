"""How the trained model does on all pictures kept from training, beside a blind guess and blank pictures."""

from collections import Counter, defaultdict

import torch
from torch import Tensor
from transformers import LlavaProcessor

from mllm.data.template import blank_pixels
from studies.smol.data import Branch
from studies.smol.training import Learner, check


def blank_features(learner: Learner, processor: LlavaProcessor) -> Tensor:
    """`[P, D]`: what the tower sees in a picture of the mean colour, standardised as all features are."""
    with torch.no_grad():
        seen = learner.model.model.vision_tower(blank_pixels(processor)).last_hidden_state[0].float()
    return (seen - learner.features.mean) / learner.features.std


def blind(known: list[Branch], asked: list[Branch]) -> dict[str, float]:
    """Per source: how often the commonest answer of training to that type of question is right."""
    commonest: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for branch in known:
        commonest[branch.source, branch.qtype][tuple(branch.ids[-branch.answer :])] += 1
    right = defaultdict(list)
    for branch in asked:
        counts = commonest[branch.source, branch.qtype].most_common(1)
        right[branch.source].append(bool(counts) and counts[0][0] == tuple(branch.ids[-branch.answer :]))
    return {source: sum(found) / len(found) for source, found in sorted(right.items())}


def validate(
    learner: Learner, processor: LlavaProcessor, known: list[Branch], held_out: list[Branch]
) -> dict[str, dict[str, float]]:
    """Per source of questions, in per cent: exact answers with pictures, with blank ones, and blind; and how many."""
    asked = [branch for branch in held_out if branch.kind == "question"]
    seen = check(learner, asked)
    unseen = check(learner, asked, blank_features(learner, processor))
    guessed = blind([branch for branch in known if branch.kind == "question"], asked)
    return {
        source: {
            "exact": round(100 * seen[f"{source} question"]["exact"], 1),
            "blanked": round(100 * unseen[f"{source} question"]["exact"], 1),
            "blind": round(100 * share, 1),
            "questions": seen[f"{source} question"]["answers"],
        }
        for source, share in guessed.items()
    }
