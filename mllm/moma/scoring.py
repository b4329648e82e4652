"""Held-out loss of a Moma model by direction of prediction, under each way its experts can choose.

B batch, S sequence, T tokens of a batch, V vocabulary, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mllm.moma.expert_choice import MODES
from mllm.moma.modeling import MomaForCausalLM
from mllm.moma.processor import MomaProcessor
from mllm.moma.stream import DIRECTIONS, UNCOUNTED, PackedRows, directions

LEAKY = "batch_leaky"


def direction_sums(logits_BSV: Tensor, ids_BS: Tensor, position_ids_BS: Tensor, processor: MomaProcessor) -> Tensor:
    """float64 [4, 2] on the CPU: loss sum and tokens of each of DIRECTIONS."""
    kinds_T = directions(ids_BS.cpu(), position_ids_BS.cpu(), processor)[:, 1:].flatten()
    logits_TV = logits_BSV[:, :-1].float().flatten(0, 1)
    loss_T = F.cross_entropy(logits_TV, ids_BS[:, 1:].flatten(), reduction="none").cpu()
    is_counted_T = kinds_T != UNCOUNTED
    kinds_N, loss_N = kinds_T[is_counted_T], loss_T[is_counted_T].double()
    sums = torch.zeros(len(DIRECTIONS), 2, dtype=torch.float64)
    return sums.index_add(0, kinds_N, torch.stack([loss_N, torch.ones_like(loss_N)], 1))


def evaluation_modes(model: MomaForCausalLM) -> list[str]:
    """The ways its experts can choose in evaluation: causal ones first, and the leaky one where training has it."""
    if not model.config.chooses_over_batch:
        return ["token"]
    return ["threshold", *(["aux"] if model.config.causal_routing == "aux" else []), LEAKY]


@contextmanager
def evaluating(model: MomaForCausalLM, mode: str | None) -> Iterator[None]:
    """The model in evaluation, its experts choosing by a mode of `evaluation_modes`; afterwards all is as before."""
    was_training, before = model.training, model.evaluation_routing
    try:
        model.eval().set_evaluation_routing(None if mode == "token" else mode)
        yield
    finally:
        model.train(was_training).set_evaluation_routing(before)


@torch.no_grad()
def held_out_losses(
    model: MomaForCausalLM,
    rows: PackedRows,
    processor: MomaProcessor,
    *,
    mode: str | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, float]:
    """Direction -> mean loss in nats, and "all" over the tokens of all four. Directions that do not come are left out.

    mode: one of `evaluation_modes`; None the model's own causal one. Over "batch_leaky" the figures depend on
    batch_size, and are no language model's.
    """
    sums = torch.zeros(len(DIRECTIONS), 2, dtype=torch.float64)
    with evaluating(model, mode):
        starts = range(0, len(rows), batch_size)
        for start in tqdm(starts, unit=" batches", desc="held-out loss", disable=not progress):
            batch = rows.batch(range(start, min(start + batch_size, len(rows))))
            ids_BS, positions_BS = batch["input_ids"].to(model.device), batch["position_ids"].to(model.device)
            logits_BSV = model(ids_BS, position_ids=positions_BS, use_cache=False).logits
            sums += direction_sums(logits_BSV, ids_BS, positions_BS, processor)
    losses = {name: (loss / n).item() for name, (loss, n) in zip(DIRECTIONS, sums, strict=True) if n}
    return losses | {"all": (sums[:, 0].sum() / sums[:, 1].sum()).item()}


def mode_label(mode: str) -> str:
    """A mode in words, as a table has it."""
    return MODES[mode]
