"""Definitions to test against: one token, one expert, one number at a time, as the papers' formulas read.

T tokens, L layers, X experts, null experts among them, P populations, K picks.
"""

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from mllm.routing import Routing


def few(examples):
    """The same examples in every run, few of them, however slow the machine."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def slow_route(
    logits_TX, *, top_k, gate, num_experts=None, allowed_TX=None, selection_bias_X=None, renormalize=None, top_p=None
):
    """`mllm.routing.route`, token by token."""
    num_experts = logits_TX.shape[1] if num_experts is None else num_experts
    renormalize = top_k > 1 if renormalize is None else renormalize
    columns = range(logits_TX.shape[1])
    rows = []
    for token, logits_X in enumerate(logits_TX):
        allowed = [x for x in columns if allowed_TX is None or allowed_TX[token, x]]
        total = sum(logits_X[x].exp() for x in allowed)
        probs = {x: logits_X[x].exp() / total for x in allowed}
        bias = {x: 0.0 if selection_bias_X is None else selection_bias_X[x].item() for x in allowed}
        ids = sorted(allowed, key=lambda x: probs[x].item() + bias[x], reverse=True)[:top_k]
        taken, mass = [], 0.0
        for x in ids:
            taken.append(top_p is None or mass < top_p)
            mass += probs[x].item()
        real = [x for x, is_taken in zip(ids, taken, strict=True) if is_taken and x < num_experts]
        weights = _weights(probs, real, gate, renormalize)
        rows.append(
            (
                torch.stack([logits_X[x] if x in probs else torch.tensor(-torch.inf) for x in columns]),
                torch.stack([probs.get(x, torch.tensor(0.0)) for x in columns]),
                torch.tensor(ids),
                torch.tensor(taken),
                torch.stack([weights.get(x, torch.tensor(0.0)) for x in ids]),
            )
        )
    return Routing(*(torch.stack(column) for column in zip(*rows, strict=True)), num_experts)


def _weights(probs, real, gate, renormalize):
    """Real expert -> the factor its output enters with."""
    if gate == "softmax":
        total = sum(probs[x] for x in real) if renormalize else 1
        return {x: probs[x] / total for x in real}
    factor = 1 / len(real) if renormalize and real else 1.0
    if gate == "none":
        return {x: torch.tensor(factor) for x in real}
    return {x: factor * probs[x] / probs[x].detach() for x in real}


def slow_target(layout, real_share=None):
    """[P][X] the share of its picks a population owes each expert."""
    rows = []
    for allowed in layout.allowed_PX.tolist():
        real, null = sum(allowed[: layout.num_experts]), sum(allowed[layout.num_experts :])
        share = real / (real + null) if real_share is None else real_share
        rows.append(
            [
                0.0 if not may else share / real if x < layout.num_experts else (1 - share) / null
                for x, may in enumerate(allowed)
            ]
        )
    return rows


def slow_balance(kind, routings, *, counted, sample, population, target_PX, null_sets=()) -> Tensor:
    """Every balance loss on one rank. `routings` goes by layer, `counted`, `sample` and `population` go by token."""

    def loss_of(cell):
        """Σ over populations, by their share of the cell's (layer, token) pairs, of Σ_x f_x / τ_x · P_x."""
        total = torch.zeros(())
        for p, target in enumerate(target_PX):
            members = [(layer, token) for layer, token in cell if population[token] == p]
            if not members:
                continue
            picked = [
                x
                for layer, token in members
                for x, taken in zip(
                    routings[layer].expert_ids_TK[token].tolist(),
                    routings[layer].is_taken_TK[token].tolist(),
                    strict=True,
                )
                if taken
            ]
            f = [picked.count(x) / max(len(picked), 1) for x in range(len(target))]
            for null_set in null_sets:
                f[null_set] = [sum(f[null_set]) / len(f[null_set])] * len(f[null_set])
            for x, due in enumerate(target):
                if due > 0:
                    mean_prob = sum(routings[layer].router_probs_TX[token, x] for layer, token in members)
                    total = total + f[x] / due * mean_prob / len(cell)
        return total

    tokens, layers = [t for t, is_counted in enumerate(counted) if is_counted], range(len(routings))
    if kind == "sample":
        cells = [[(layer, t) for layer in layers for t in tokens if sample[t] == b] for b in sorted(set(sample))]
    else:
        cells = [[(layer, t) for t in tokens] for layer in layers]
    losses = [loss_of(cell) for cell in cells if cell]
    return sum(losses) / len(losses) if losses else torch.zeros(())


def gradients_of(scalar, inputs):
    """Zeros for an input that the scalar does not use."""
    if not scalar.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return torch.autograd.grad(scalar, inputs, allow_unused=True, materialize_grads=True, retain_graph=True)


def assert_close_gradients(left, right, inputs, **tolerance):
    for a, b in zip(gradients_of(left, inputs), gradients_of(right, inputs), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
