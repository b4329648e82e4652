"""Part native: a small mixture of experts (OLMoE's architecture) that learns twelve families of questions on digits.

A family is a table of its own, looked up by two of three digits, so that what experts keep is knowledge, and it matters
which experts a router takes: routers thrown off by noise of their own size cost a fifth of what is right. The model
learns all families; alignment sees nine of them, and the other three, one for each pair of digits, are held out from
it. A family has four wordings, so that a question's nearest are of its own family and of kindred ones. B batch, S
sequence, N rows.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from mllm.alignment import CachedStates, TokenRows, base_embeddings, cache_states, prepare, routed_layers, score
from mllm.alignment.align import row_order
from mllm.alignment.embeddings import centred
from mllm.alignment.tail import answer_logits
from mllm.data.template import IGNORED
from mllm.mole.native_moe import balance_loss
from studies.roma.runs import Sizes, Task
from studies.runner import locked

SIZES = Sizes()
LENGTH = 3  # digits of a question
PAIRS = ((0, 1), (0, 2), (1, 2))
TABLES = 4  # for each pair


def _table(number: int) -> np.ndarray:
    return np.random.default_rng([number, 5]).integers(0, 10, (10, 10))


# Of each family which digits it asks about, and its answers [10, 10].
FAMILIES: dict[str, tuple[tuple[int, int], np.ndarray]] = {
    f"digits_{first}{second}_{k}": ((first, second), _table(len(PAIRS) * k + number))
    for k in range(TABLES)
    for number, (first, second) in enumerate(PAIRS)
}
HELD_OUT = tuple(family for family in FAMILIES if family.endswith("_3"))
WORDINGS, PAD, IS, END, FIRST_DIGIT = 4, 0, 1, 2, 3
VOCAB = FIRST_DIGIT + 10 + WORDINGS * len(FAMILIES)


@dataclass(frozen=True)
class NativePart:
    """Sizes of the model and its rows; models and states are kept in `work`."""

    work: Path = Path("runs/roma_study_native")
    width: int = 48
    expert_width: int = 24
    depth: int = 4
    experts: int = 16
    first_steps: int = 2500
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
        model = self._model(seed)
        rows, families = self._rows(seed)
        train, validation, test = self._split(families)
        folder = self.work / f"states-{self._stamp(seed)}"
        first = routed_layers(model, self.sizes.layers)[0].depth
        with locked(self.work / f"states-{self._stamp(seed)}.lock", wait=True):
            cache_states(model, rows, folder, first_layer=first, batch_size=64, stamp=self._stamp(seed))
        embeddings_NM = base_embeddings(model, rows, batch_size=64)
        data = CachedStates(folder, pad_token_id=PAD)
        return Task(
            model, data, train, validation, test, families, HELD_OUT,
            centred(embeddings_NM, embeddings_NM[train].mean(0)), score(model, data, batch_size=128).exact_N,
        )  # fmt: skip

    def _model(self, seed: int) -> nn.Module:
        return self._first_model(seed)

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
        with locked(path.with_suffix(".lock"), wait=True):
            if path.is_file():
                load_model(model, path)
                return prepare(model.eval())
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


@dataclass(frozen=True)
class MisroutedPart(NativePart):
    """The control in which there is something to gain: the same models, the routers to be aligned thrown off by noise.

    Experts still know what they knew; only the routers' choice is wrong.
    """

    noise: float = 1.0  # standard deviation, in units of that of the router's own weights

    name = "misrouted"

    def _model(self, seed: int) -> nn.Module:
        sound = NativePart(**{each.name: getattr(self, each.name) for each in fields(NativePart)})
        model, generator = sound._first_model(seed), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in routed_layers(model, self.sizes.layers):
                for weight in layer.parameters().values():
                    weight += self.noise * weight.std() * torch.randn(weight.shape, generator=generator)
        return model


def questions(families: list[str], rng: np.random.Generator) -> TokenRows:
    """A wording of the family, digits, "is", and supervised: the answer and the end."""
    ids, labels, numbers = [], [], {family: number for number, family in enumerate(FAMILIES)}
    for family in families:
        digits = rng.integers(0, 10, LENGTH)
        (one, other), answers = FAMILIES[family]
        word = FIRST_DIGIT + 10 + WORDINGS * numbers[family] + rng.integers(WORDINGS)
        prompt = [word, *(FIRST_DIGIT + digits), IS]
        answer = [FIRST_DIGIT + int(answers[digits[one], digits[other]]), END]
        ids.append(torch.tensor([*prompt, *answer]))
        labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
    return TokenRows(ids, labels, families, pad_token_id=PAD)
