"""Only the end of a model: the states that enter the first trained layer are kept on disk, what lies before is skipped.

Routers of the last layers cannot change what comes before them, so an epoch of router training needs the layers from
the first trained one on and nothing else. States are kept in the model's own type (bf16 for a bf16 base), which loses
nothing; padding is not kept. In the batches in which they were made, cached equals uncached to the last bit in fp32; in
other batches as far as a model's own results depend on what it is batched with.

B batch, S sequence, T tokens of a shard, D width, P positions, V vocabulary, N rows.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mllm.alignment.data import AlignmentData, Batch, padded
from mllm.alignment.routes import decoder_layers, unwrapped
from mllm.common.errors import UserError
from mllm.data.template import IGNORED
from mllm.routing import routing_context

HIDDEN, FIRST = "hidden_BSD", "first_layer"  # keys of a batch that starts inside the model
PICTURE = "picture_BD"  # and, where routers read it, what they are told of the rows' pictures
INDEX = "index.json"
STORED = ("states", "input_ids", "labels", "pictures")  # of a shard, all its samples one after the other
SHARD_TOKENS = 1 << 18
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of logits against their largest; other types: 0.05


@contextmanager
def skipped(layers: Iterable[nn.Module]) -> Iterator[None]:
    """These decoder layers hand on what they get. They stay in their places: masks and caches go by number."""
    layers = list(layers)
    try:
        for layer in layers:
            layer.forward = _hand_on
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def run(model: nn.Module, inputs: dict[str, Any], positions_P: Tensor | None) -> Tensor | None:
    """Runs the model on a batch, whole or from `first_layer` on where the batch holds hidden states.

    The routing is in the model's RoutingContext afterwards.

    Returns:
        Logits at the positions, [B, P, V]; None without positions.
    """
    inputs = _moved(inputs, model)
    if HIDDEN not in inputs:
        keep = 1 if positions_P is None else positions_P
        logits_BPV = model(**inputs, use_cache=False, logits_to_keep=keep).logits
        return None if positions_P is None else logits_BPV
    base, context, mask_BS = unwrapped(model), routing_context(model), inputs["attention_mask"]
    context.carry(base)
    context.begin(input_ids=inputs["input_ids"], attention_mask=mask_BS, picture_BD=inputs.get(PICTURE))
    try:
        with skipped(decoder_layers(model)[: inputs[FIRST]]):
            decoder = base.get_decoder()
            hidden_BSD = decoder(inputs_embeds=inputs[HIDDEN], attention_mask=mask_BS, use_cache=False)[0]
    finally:
        context.end()
    return None if positions_P is None else base.get_output_embeddings()(hidden_BSD[:, positions_P])


def _moved(inputs: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Tensors on the model's device, pixels and states in its type; what routers read of pictures stays fp32."""
    base = unwrapped(model)

    def move(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(base.device, base.dtype if value.is_floating_point() and key != PICTURE else value.dtype)

    return {key: move(key, value) for key, value in inputs.items()}


def answer_logits(model: nn.Module, inputs: dict[str, Any], labels_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, V] (fp32), target [T] and row [T] of the T supervised tokens of a batch; no other logits are made."""
    asked_BS = labels_BS[:, 1:] != IGNORED
    positions_P = asked_BS.any(0).nonzero().flatten()
    logits_BPV = run(model, inputs, positions_P.to(unwrapped(model).device))
    asked_BP, targets_BP = asked_BS[:, positions_P], labels_BS[:, 1:][:, positions_P]
    rows_T = asked_BP.nonzero()[:, 0]
    device = logits_BPV.device
    return logits_BPV[asked_BP.to(device)].float(), targets_BP[asked_BP].to(device), rows_T.to(device)


# -- the cache ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cache_states(
    model: nn.Module,
    data: AlignmentData,
    folder: str | Path,
    *,
    first_layer: int,
    rows: Sequence[int] | None = None,
    batch_size: int = 16,
    part: str = "0",
    stamp: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the states entering decoder layer `first_layer` of every row into `folder/part`, whole or not at all.

    What is there with the same stamp, layer, rows and type is kept. Several processes write a part each, of their
    own rows.

    Args:
        stamp: changes with everything the states depend on: base, adapter, rows.
        dtype: of the states kept; None: the model's own.

    Raises:
        UserError: run from these states on, the model does not give the logits it gives as a whole.
    """
    rows = list(range(len(data)) if rows is None else rows)
    dtype = dtype or unwrapped(model).dtype
    target, draft = Path(folder) / part, Path(folder) / f".{part}.part"
    about = {"stamp": stamp, FIRST: first_layer, "rows": rows, "dtype": str(dtype)}
    if (target / INDEX).is_file() and _same(json.loads((target / INDEX).read_text(encoding="utf-8")), about):
        return
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    shards, waiting = [], []
    for start in range(0, len(rows), batch_size):
        batch = data.batch(rows[start : start + batch_size])
        states = entering(model, batch[0], first_layer)
        states[HIDDEN] = states[HIDDEN].to(dtype)
        if start == 0:
            _check(model, batch, states)
        waiting += _without_padding(batch, states)
        if sum(len(sample["input_ids"]) for sample in waiting) >= SHARD_TOKENS or start + batch_size >= len(rows):
            shards.append(_write_shard(draft / f"states-{len(shards):05d}.safetensors", waiting))
            waiting = []
    (draft / INDEX).write_text(json.dumps(about | {"shards": shards}) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(draft, target)


def _same(there: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(there[key] == value for key, value in wanted.items())


def entering(model: nn.Module, inputs: dict[str, Any], first_layer: int) -> dict[str, Any]:
    """The states that enter decoder layer `first_layer`, as keys of a batch that starts there.

    `hidden_BSD`, `first_layer` and, where routers read pictures, `picture_BD`. That layer and those behind it are not
    run.
    """
    layers, seen = decoder_layers(model), []
    if not 0 <= first_layer < len(layers):
        raise UserError(f"first_layer={first_layer} must be from 0 to {len(layers) - 1}.")

    def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = layers[first_layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with skipped(layers[first_layer:]):
            run(model, inputs, None)
    finally:
        hook.remove()
    picture_BD = routing_context(model).picture_BD
    return {HIDDEN: seen[0], FIRST: first_layer} | ({} if picture_BD is None else {PICTURE: picture_BD})


def _check(model: nn.Module, batch: Batch, states: dict[str, Any]) -> None:
    """A model that does something between its embedding and its layers, or beside them, cannot be cut."""
    inputs, labels_BS, _ = batch
    whole_TV, _, _ = answer_logits(model, inputs, labels_BS)
    kept = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    cut_TV, _, _ = answer_logits(model, kept | states, labels_BS)
    worst = ((whole_TV - cut_TV).abs().max() / whole_TV.abs().max()).item()
    if not worst <= TOLERANCE.get(states[HIDDEN].dtype, 0.05):
        raise UserError(
            f"{type(unwrapped(model)).__name__} cannot be run from layer {states[FIRST]} on alone: its logits then"
            f" differ by {worst:.2g} of the largest. Align it without a cache (cache: false)."
        )


def _without_padding(batch: Batch, states: dict[str, Any]) -> list[dict[str, Any]]:
    inputs, labels_BS, domains = batch
    hidden_BSD = states[HIDDEN].cpu()
    picture_BD = states.get(PICTURE, hidden_BSD.new_empty(len(hidden_BSD), 0)).cpu()
    rows = zip(inputs["input_ids"], labels_BS, inputs["attention_mask"].bool(), domains, strict=True)
    return [
        {
            "states": hidden_BSD[row, real_S],
            "input_ids": ids_S[real_S],
            "labels": labels_S[real_S],
            "pictures": picture_BD[row : row + 1],
            "domain": domain,
        }
        for row, (ids_S, labels_S, real_S, domain) in enumerate(rows)
    ]


def _write_shard(path: Path, samples: list[dict[str, Any]]) -> dict[str, Any]:
    save_file({key: torch.cat([sample[key] for sample in samples]).contiguous() for key in STORED}, path)
    return {
        "file": path.name,
        "lengths": [len(sample["input_ids"]) for sample in samples],
        "domains": [sample["domain"] for sample in samples],
    }


class CachedStates:
    """The rows that `cache_states` wrote, all parts together, under the numbers they had; an `AlignmentData`."""

    def __init__(self, folder: str | Path, *, pad_token_id: int = 0, side: str = "right") -> None:
        """Raises UserError where the folder holds no states."""
        self.pad_token_id, self.side = pad_token_id, side
        self._places: dict[int, tuple[list[Tensor], slice, slice, str]] = {}
        for index in sorted(Path(folder).glob(f"[!.]*/{INDEX}")):
            about = json.loads(index.read_text(encoding="utf-8"))
            self.first_layer, rows = about[FIRST], iter(about["rows"])
            for shard in about["shards"]:
                file = safe_open(index.parent / shard["file"], framework="pt")
                tensors, start = [file.get_tensor(key) for key in STORED], 0  # mapped: read when looked at
                for number, (length, domain) in enumerate(zip(shard["lengths"], shard["domains"], strict=True)):
                    places = slice(start, start + length), slice(number, number + 1)
                    self._places[next(rows)] = (tensors, *places, domain)
                    start += length
        if not self._places:
            raise UserError(f"{folder} holds no cached states; expected a folder written by cache_states.")

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, rows: Sequence[int]) -> Batch:
        """As the model's own batch, with `hidden_BSD` and `first_layer` in the place of pictures."""
        states, ids, labels, pictures = zip(*(self._read(row) for row in rows), strict=True)
        inputs = {
            "input_ids": padded(ids, self.pad_token_id, self.side),
            "attention_mask": padded([torch.ones_like(ids_S) for ids_S in ids], 0, self.side),
            HIDDEN: padded(states, 0.0, self.side),
            FIRST: self.first_layer,
        }
        if pictures[0].shape[1]:
            inputs[PICTURE] = torch.cat(pictures)
        return inputs, padded(labels, IGNORED, self.side), [self._places[row][3] for row in rows]

    def _read(self, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (states, ids, labels, pictures), tokens, number, _ = self._places[row]
        return states[tokens], ids[tokens], labels[tokens], pictures[number]
