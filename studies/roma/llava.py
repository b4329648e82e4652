"""Parts miniworld and real: the routers of a MoLE adapter of a LLaVA. Families are kinds of question, or sources.

N rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mllm.alignment import CachedStates, EncodedRows, base_embeddings, cache_states, routed_layers, score
from mllm.alignment.embeddings import centred
from mllm.build import load, resolve
from mllm.common.digests import digest
from mllm.common.errors import UserError
from mllm.data.conversation import Conversation
from mllm.data.sources import Source
from studies.roma.runs import Sizes, Task
from studies.runner import locked

SIZES = Sizes(steps=60, batch_size=8, layers=3)
HELD_OUT = {"miniworld": ("relation", "larger", "line", "place"), "real": ("vqa_rad", "fara_forms", "coco_mini")}


@dataclass(frozen=True)
class LlavaPart:
    """`data` holds train.json and test.json. A seed draws its training and validation rows; test rows are shared."""

    name: str
    base: str
    adapter: Path
    data: Path
    work: Path = Path("runs/roma_study_llava")
    train: int = 1200
    validation: int = 200
    of_a_family: int = 120  # test rows, or as many as there are
    sizes: Sizes = SIZES

    def recipe(self) -> dict[str, Any]:
        """Sizes, and model and rows by what their files hold."""
        sizes = {key: value for key, value in asdict(self).items() if isinstance(value, int)}
        return sizes | {"model": contents(resolve(self.base), self.adapter), "rows": contents(self.data)}

    def family(self, row: Conversation) -> str:
        """Kind of question, or the source where rows name none."""
        return (self.name == "miniworld" and row.qtype) or row.source

    def task(self, seed: int) -> Task:
        """States and embeddings of all rows that any seed may take are made once."""
        model, data, embeddings_NM, succeeded_N = self._prepared
        drawn, tested = self._rows
        families = [self.family(row) for row in (*drawn, *tested)]
        num_train = len(drawn)
        held_out = HELD_OUT[self.name]
        seen = [row for row in range(num_train) if families[row] not in held_out]
        seen = np.random.default_rng(seed).permutation(seen)[: self.train + self.validation].tolist()
        train, validation = seen[: -self.validation], seen[-self.validation :]
        return Task(
            model, data, train, validation, range(num_train, len(families)), families, held_out,
            centred(embeddings_NM, embeddings_NM[train].mean(0)), succeeded_N,
        )  # fmt: skip

    @cached_property
    def _rows(self) -> tuple[list[Conversation], list[Conversation]]:
        """Rows for seeds to draw from, twice as many as they take, and test rows."""
        train, test = (list(Source(self.data / f"{split}.json")) for split in ("train", "test"))
        drawn = np.random.default_rng(0).permutation(len(train))[: 2 * (self.train + self.validation)]
        tested, taken = [], Counter()
        for row in np.random.default_rng(1).permutation(len(test)):
            if taken[self.family(test[row])] < self.of_a_family:
                taken[self.family(test[row])] += 1
                tested.append(test[row])
        missing = set(HELD_OUT[self.name]) - {self.family(row) for row in tested}
        if missing:
            names = ", ".join(sorted(missing))
            raise UserError(f"{self.data}/test.json: no rows are of the held-out families {names}.")
        return [train[row] for row in drawn], tested

    @cached_property
    def _prepared(self) -> tuple[Any, CachedStates, torch.Tensor, torch.Tensor]:
        model, processor = load(self.base, adapter=self.adapter)
        whole = EncodedRows([*self._rows[0], *self._rows[1]], processor)
        key = digest([self.recipe(), self.sizes.layers])
        folder = self.work / f"{self.name}-{key}"
        first = routed_layers(model, self.sizes.layers)[0].depth
        with locked(self.work / f"{key}.lock", wait=True):
            cache_states(model, whole, folder, first_layer=first, batch_size=32, stamp=key)
            data = CachedStates(folder, pad_token_id=processor.tokenizer.pad_token_id)
            path = folder / "rows.safetensors"
            if not path.is_file():
                succeeded_N = score(model, data).exact_N
                save_file({"embeddings": base_embeddings(model, whole, batch_size=32), "succeeded": succeeded_N}, path)
        tensors = load_file(path)
        return model, data, tensors["embeddings"], tensors["succeeded"]


def contents(*folders: str | Path) -> str:
    """A short name of what the files of these folders hold, wherever and since whenever they lie there."""
    name = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*")) if path.is_file()):
        name.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return name.hexdigest()[:12]
