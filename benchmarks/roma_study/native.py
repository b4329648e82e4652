"""Part native: a small mixture of experts (OLMoE's architecture) that learns twelve families of questions on digits.

The model learns all families; alignment sees eight of them, and the other four are held out from it. A family has four
wordings, so that a question's nearest are of its own family and of kindred ones. B batch, S sequence, N rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from benchmarks.roma_study.runs import Sizes, Task
from mllm.alignment import CachedStates, TokenRows, base_embeddings, cache_states, prepare, routed_layers, score
from mllm.alignment.align import row_order
from mllm.alignment.embeddings import centred
from mllm.alignment.tail import answer_logits
from mllm.data.template import IGNORED
from mllm.native_moe import balance_loss

SIZES = Sizes()
LENGTH = 5  # digits of a question
FAMILIES: dict[str, Callable[[np.ndarray], int]] = {
    "first": lambda digits: digits[0],
    "last": lambda digits: digits[-1],
    "second": lambda digits: digits[1],
    "largest": lambda digits: digits.max(),
    "smallest": lambda digits: digits.min(),
    "after_first": lambda digits: (digits[0] + 1) % 10,
    "first_two": lambda digits: (digits[0] + digits[1]) % 10,
    "count_even": lambda digits: (digits % 2 == 0).sum(),
    "middle": lambda digits: digits[2],
    "before_last": lambda digits: (digits[-1] - 1) % 10,
    "last_two": lambda digits: (digits[-1] + digits[-2]) % 10,
    "count_small": lambda digits: (digits < 4).sum(),
}
HELD_OUT = ("middle", "before_last", "last_two", "count_small")
WORDINGS, PAD, IS, END, FIRST_DIGIT = 4, 0, 1, 2, 3
VOCAB = FIRST_DIGIT + 10 + WORDINGS * len(FAMILIES)


@dataclass(frozen=True)
class NativePart:
    """Sizes of the model and its rows; models and states are kept in `work`."""

    work: Path = Path("runs/roma_study_native")
    width: int = 64
    expert_width: int = 64
    depth: int = 6
    experts: int = 8
    first_steps: int = 1500
    first_batch: int = 64
    train: int = 1600
    validation: int = 400
    test: int = 2400
    sizes: Sizes = SIZES

    name = "native"

    def recipe(self) -> dict[str, Any]:
        """Sizes."""
        return {key: value for key, value in asdict(self).items() if key not in ("work", "sizes")}

    def task(self, seed: int) -> Task:
        """A model that has learned all families, not to the end, and rows it has not learned from."""
        model = self._first_model(seed)
        rows, families = self._rows(seed)
        train, validation, test = self._split(families)
        folder = self.work / f"states-{self._stamp(seed)}"
        first = routed_layers(model, self.sizes.layers)[0].depth
        cache_states(model, rows, folder, first_layer=first, batch_size=64, stamp=self._stamp(seed))
        embeddings_NM = base_embeddings(model, rows, batch_size=64)
        data = CachedStates(folder, pad_token_id=PAD)
        return Task(
            model, data, train, validation, test, families, HELD_OUT,
            centred(embeddings_NM, embeddings_NM[train].mean(0)), score(model, data, batch_size=128).exact_N,
        )  # fmt: skip

    def _rows(self, seed: int) -> tuple[TokenRows, list[str]]:
        number = self.train + self.validation + self.test
        families = [list(FAMILIES)[row % len(FAMILIES)] for row in range(2 * number)]
        return questions(families, np.random.default_rng([seed, 1])), families

    def _split(self, families: list[str]) -> tuple[list[int], list[int], list[int]]:
        """Training and validation rows are of trained families alone; test rows of all."""
        seen = [row for row, family in enumerate(families) if family not in HELD_OUT]
        train, validation = seen[: self.train], seen[self.train : self.train + self.validation]
        first_free = validation[-1] + 1
        return train, validation, list(range(first_free, first_free + self.test))

    def _first_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = OlmoeForCausalLM._from_config(self._config, experts_implementation="grouped_mm")
        path = self.work / f"model-{self._stamp(seed)}.safetensors"
        if path.is_file():
            load_model(model, path)
            return prepare(model.eval())
        path.parent.mkdir(parents=True, exist_ok=True)
        self._teach(prepare(model), seed)
        save_model(model, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        return model.eval()

    def _teach(self, model: nn.Module, seed: int) -> None:
        families = [list(FAMILIES)[row % len(FAMILIES)] for row in range(20_000)]
        data = questions(families, np.random.default_rng([seed, 2]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=self.first_steps)
        model.train()
        for rows in row_order(range(len(data)), self.first_steps, self.first_batch, seed):
            inputs, labels_BS, _ = data.batch(rows)
            logits_TV, targets_T, _ = answer_logits(model, inputs, labels_BS)
            loss = nn.functional.cross_entropy(logits_TV, targets_T) + 0.01 * balance_loss(model)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad(set_to_none=True)

    def _stamp(self, seed: int) -> str:
        return hashlib.sha256(str([self.recipe(), self.sizes.layers, seed]).encode()).hexdigest()[:12]

    @property
    def _config(self) -> OlmoeConfig:
        return OlmoeConfig(
            vocab_size=VOCAB, hidden_size=self.width, intermediate_size=self.expert_width, pad_token_id=PAD,
            eos_token_id=END, num_hidden_layers=self.depth, num_attention_heads=4, num_key_value_heads=4,
            num_experts=self.experts, num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=32,
        )  # fmt: skip


def questions(families: list[str], rng: np.random.Generator) -> TokenRows:
    """A wording of the family, digits, "is", and supervised: the answer and the end."""
    ids, labels, numbers = [], [], {family: number for number, family in enumerate(FAMILIES)}
    for family in families:
        digits = rng.integers(0, 10, LENGTH)
        word = FIRST_DIGIT + 10 + WORDINGS * numbers[family] + rng.integers(WORDINGS)
        prompt = [word, *(FIRST_DIGIT + digits), IS]
        answer = [FIRST_DIGIT + int(FAMILIES[family](digits)), END]
        ids.append(torch.tensor([*prompt, *answer]))
        labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
    return TokenRows(ids, labels, families, pad_token_id=PAD)
