"""Which samples the model answers correctly: only they may be neighbours (RoMA's set S).

Either by the evaluation itself, which has the model write its answers and grades them by each source's own metric, or
by one forward, which tells whether greedy decoding would give the answer to the letter.

N samples, T supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ProcessorMixin

from mllm.alignment.data import AlignmentData, Batch
from mllm.alignment.tail import answer_logits
from mllm.common import ranks
from mllm.common.errors import UserError
from mllm.data.conversation import Conversation
from mllm.evaluation.answers import Answer
from mllm.evaluation.recipe import Recipe
from mllm.inference.answering import ResumableAnswers, answer_all
from mllm.inference.evaluate import code_stamp, template_of
from mllm.inference.generate import evaluating


def answered(
    model: nn.Module,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    path: Path,
    *,
    stamp: str,
    batch_size: int = 32,
    max_new_tokens: int = 32,
) -> list[Answer]:
    """The model's answers, as the evaluation gets them, kept in `path` (a .jsonl) and taken from there if they fit.

    The ranks share the work. `stamp` changes with the model's weights.
    """
    recipe = Recipe.of(
        conversations, split=path.stem, template=template_of(processor), decoding=f"greedy, {max_new_tokens} tokens"
    )
    origin = {"prompt, template or decoding": recipe.asked, "model": stamp, "code": code_stamp()}
    answers_file = None
    if ranks.is_first():
        answers_file = ResumableAnswers(path, origin, model_id=path.stem, recipe=recipe, fresh=False)
    sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    return answer_all(model, processor, conversations, answers_file, **sizes)[0]


def successful(answers: Sequence[Answer], *, least_grade: float = 1.0) -> Tensor:
    """bool [N] whose grade by the row's own metric is at least `least_grade`; rows that are not graded are not.

    Raises UserError where none is: there would be nobody to learn from.
    """
    grades_N = np.array([answer.grade() if answer.graded else -1.0 for answer in answers])
    succeeded_N = torch.from_numpy(grades_N >= least_grade - 1e-9)
    if not succeeded_N.any():
        raise UserError(
            f"None of {len(answers)} samples was answered with a grade of at least {least_grade}, so nobody can be a "
            "neighbour. Lower align.least_grade, take more samples, or train the adapter further first."
        )
    return succeeded_N


@dataclass(frozen=True)
class Scores:
    """Of each sample, in the order of the rows: mean loss of its answer tokens, and whether all of them are the most
    probable ones, so that greedy decoding would write the answer."""

    loss_N: Tensor
    exact_N: Tensor


@torch.no_grad()
def score(
    model: nn.Module,
    data: AlignmentData,
    rows: Sequence[int] | None = None,
    *,
    batch_size: int = 32,
    around: Callable[[Sequence[int], Batch], AbstractContextManager] | None = None,
) -> Scores:
    """Scores rows by one forward each, whole or from cached states; `around` is entered for each batch's forward."""
    rows = range(len(data)) if rows is None else rows
    losses, exact = [], []
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        inputs, labels_BS, _ = batch = data.batch(chosen)
        with evaluating(model), around(chosen, batch) if around else nullcontext():
            logits_TV, targets_T, rows_T = answer_logits(model, inputs, labels_BS)
        sums = torch.zeros(3, len(labels_BS), device=logits_TV.device)
        loss_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
        right_T = (logits_TV.argmax(-1) == targets_T).float()
        sums.index_add_(1, rows_T, torch.stack([loss_T, right_T, torch.ones_like(loss_T)]))
        losses.append((sums[0] / sums[2]).cpu())
        exact.append((sums[1] == sums[2]).cpu())
    return Scores(torch.cat(losses), torch.cat(exact))
