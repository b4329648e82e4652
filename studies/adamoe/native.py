"""Part B: a small mixture-of-experts language model, learned on English prose and continued by every arm.

OLMoE's architecture with weights renormalised over a token's picks, as Mixtral and AdaMoE have them; top-2 of eight
experts. Each seed learns its own model at a constant rate; then all arms continue it, in the same order of text, as the
rate falls to zero. The text is Python's language reference, which every Python has; topics are held out whole.
Identity nulls are here only: a null pick that passes its input on needs a block as wide behind as before, and in an
adapter it is linears that carry experts. Top-p is in part A only: native routers have no such choice.

B batch, S sequence, T = B·S tokens, W windows of S + 1 tokens, L routed layers, V vocabulary.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from mllm.build import load_processor
from mllm.mole.native_moe import add_null_experts, balance_loss, router_parameters, routing_context
from mllm.routing import RoutingStats
from studies.adamoe.adapters import joined, log_frequencies, routing_figures
from studies.adamoe.runs import Arm, Measured, Tokens
from studies.runner import locked

# 1.71, 1.41 and 1.14 real picks of three where routing is even.
NULLS = {f"m{m}": {"top_k": 3, "num_null_experts": m} for m in (6, 9, 13)}

ARMS = (
    Arm("top1", "top-1", {"top_k": 1}),
    Arm("top2", "top-2"),
    *(Arm(f"drop{percent}", "dropping", {"drop_share": percent / 100}) for percent in (15, 30, 45, 65)),
    *(Arm(f"null_{name}", "null", nulls) for name, nulls in NULLS.items()),
    *(Arm(f"shared_{name}", "shared null", nulls | {"null_logits": "shared"}) for name, nulls in NULLS.items()),
    *(Arm(f"identity_{name}", "identity null", nulls | {"null_kind": "identity"}) for name, nulls in NULLS.items()),
    Arm("frozen_m9", "null, frozen router", NULLS["m9"]),
)


@dataclass(frozen=True)
class NativeStudy:
    """Sizes of part B. Models that arms continue are kept in `work`."""

    work: Path = Path("runs/adamoe_pareto_native")
    width: int = 128
    expert_width: int = 128
    layers: int = 4
    experts: int = 8
    sequence: int = 128
    batch_size: int = 8
    first_steps: int = 500
    arm_steps: int = 100
    lr: float = 2e-3
    balance_loss_weight: float = 0.01

    part = "b"
    arms = ARMS

    def recipe(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Sizes and the text, by its hash."""
        sizes = {key: value for key, value in asdict(self).items() if key != "work"}
        return sizes | {"text": hashlib.sha256("".join(prose().values()).encode()).hexdigest()[:12]}

    def prepare(self) -> None:
        """Cut the text into windows."""
        self.windows  # noqa: B018

    def run(self, arm: Arm, seed: int) -> Measured:
        """The seed's model, changed to the arm and continued."""
        train_WS, test_WS = self.windows
        model = self.first_model(seed)
        torch.manual_seed(seed)
        settings = {"num_null_experts": 0} | arm.settings
        if settings.get("top_k") == 1:
            # With one renormalised pick the router learns from balance alone. That is refused to users; here it is the
            # point of comparison, so the model itself is made top-1 and then taken as it is.
            for module in model.modules():
                if hasattr(module, "norm_topk_prob"):
                    module.top_k = settings.pop("top_k", 1)
        add_null_experts(model, **settings)
        if arm.family.endswith("frozen router"):
            for parameter in router_parameters(model):
                parameter.requires_grad_(False)
        rates = np.linspace(self.lr, 0, self.arm_steps, endpoint=False)
        learn(model, batches(train_WS, self.batch_size, self.arm_steps, seed + 1000), rates, self.balance_loss_weight)
        return measure(model, test_WS, log_frequencies(train_WS.flatten()))

    def first_model(self, seed: int) -> OlmoeForCausalLM:
        """Top-2, learned from nothing; kept, since every arm of a seed starts from it."""
        torch.manual_seed(seed)
        model = OlmoeForCausalLM._from_config(self.config, experts_implementation="eager")  # the fastest at this size
        recipe = hashlib.sha256(str(self.recipe(ARMS[1], seed)).encode()).hexdigest()[:12]
        path = self.work / f"s{seed}-{recipe}.pt"
        with locked(path.with_suffix(".lock"), wait=True):
            if not path.is_file():
                learner = OlmoeForCausalLM._from_config(self.config, experts_implementation="eager")
                learner.load_state_dict(model.state_dict())
                add_null_experts(learner, num_null_experts=0)
                rates = self.lr * np.minimum(1, np.arange(1, self.first_steps + 1) / 20)
                order = batches(self.windows[0], self.batch_size, self.first_steps, seed)
                learn(learner, order, rates, self.balance_loss_weight)
                torch.save(learner.state_dict(), path.with_suffix(".part"))
                os.replace(path.with_suffix(".part"), path)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    @property
    def config(self) -> OlmoeConfig:
        """The model's sizes."""
        return OlmoeConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=self.width,
            intermediate_size=self.expert_width,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=self.experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            max_position_embeddings=self.sequence,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The embedded base's, which has learned its pieces from this prose too."""
        return load_processor("miniworld").tokenizer

    @cached_property
    def windows(self) -> tuple[Tensor, Tensor]:
        """Training and test text, int64 [W, S + 1] each; what is left over at the end is dropped."""
        return tuple(self._cut(text) for text in prose().values())

    def _cut(self, text: str) -> Tensor:
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        size = self.sequence + 1
        return ids[: len(ids) // size * size].view(-1, size)


def prose() -> dict[str, str]:
    """ "train" and "test" text. Every sixth topic is held out; topics quote one another, so a paragraph that a held-out
    one has too is not trained on.
    """
    from pydoc_data.topics import topics

    named = [[paragraph.strip("\n") for paragraph in topics[name].split("\n\n")] for name in sorted(topics)]
    test = list(dict.fromkeys(paragraph for topic in named[::6] for paragraph in topic))
    train = dict.fromkeys(paragraph for topic in named for paragraph in topic)
    held_out = set(test)
    return {"train": "\n\n".join(each for each in train if each not in held_out), "test": "\n\n".join(test)}


def batches(windows_WS: Tensor, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """[B, S + 1] a step: shuffled passes over the windows."""
    rng, draws = np.random.default_rng(seed), steps * batch_size
    passes = [rng.permutation(len(windows_WS)) for _ in range(-(-draws // len(windows_WS)))]
    return iter(windows_WS[torch.from_numpy(np.concatenate(passes)[:draws])].split(batch_size))


def learn(model: nn.Module, order: Iterator[Tensor], rates: np.ndarray, balance_loss_weight: float) -> None:
    """AdamW on the next-token loss and the balance loss, a rate a step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    model.train()
    for rate, ids_BS in zip(rates, order, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = next_token_losses(model, ids_BS)[0].mean() + balance_loss_weight * balance_loss(model)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def next_token_losses(model: nn.Module, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [T] of predicting the token after each, and whether the most probable one was right."""
    logits_TV = model(input_ids=ids_BS[:, :-1], use_cache=False).logits.flatten(0, 1)
    next_T = ids_BS[:, 1:].flatten()
    return F.cross_entropy(logits_TV, next_T, reduction="none"), logits_TV.argmax(-1) == next_T


@torch.no_grad()
def measure(model: nn.Module, windows_WS: Tensor, log_frequency_V: np.ndarray, *, batch_size: int = 32) -> Measured:
    """Every token of the windows is scored."""
    model.eval()
    context, stats, columns, right = routing_context(model), RoutingStats(), [], []
    for ids_BS in windows_WS.split(batch_size):
        loss_T, right_T = next_token_losses(model, ids_BS)
        stats.update(context)
        rows, length = ids_BS[:, :-1].shape
        token_T = ids_BS[:, :-1].flatten().clamp(max=len(log_frequency_V) - 1)
        columns.append(
            Tokens(
                loss_T.numpy().astype(np.float16),
                context.stack("is_real_TK").sum(-1).T.to(torch.int8).numpy(),
                np.tile(np.arange(length, dtype=np.int16), rows),
                log_frequency_V[token_T].astype(np.float16),
            )
        )
        right.append(right_T)
    tokens = joined(columns)
    figures = routing_figures(stats) | {"right": float(torch.cat(right).float().mean())}
    return Measured(figures | {"loss": float(tokens.loss_N.astype(np.float64).mean())}, tokens)
