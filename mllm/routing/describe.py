"""What routing can be set to, in a line each, for `mllm routing`. Keys are fields of MoleConfig.

Routers speak for themselves: a new file in `mllm.routing.routers` appears by its class's first sentence.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import NamedTuple

from mllm.routing.routers import ROUTERS, find_router


class Option(NamedTuple):
    """One setting: its name in a config, what it does, and the arXiv number of the paper it is from, if any."""

    name: str
    line: str
    paper: str = ""


OPTIONS: dict[str, tuple[Option, ...]] = {
    "router_input": (
        Option("block", "One decision for all linears of a block, made from the block's input.", "2401.16160"),
        Option("linear", "Each linear has a router of its own and decides from its own input.", "2406.13233"),
    ),
    "router_reads": (
        Option("token", "The router reads the token's hidden state, as in all four papers."),
        Option("picture", "It reads the mean embedding of the row's pictures: one decision a row and layer."),
        Option("both", "It reads the two side by side; the default where a model takes pictures."),
    ),
    "router_start": (
        Option("domains", "Where routers read the picture: the linear discriminant of the mixture's domains."),
        Option("clusters", "That of as many clusters of pictures as there are experts; needs no labels."),
        Option("random", "The framework's initialisation."),
    ),
    "gate": (
        Option(
            "straight_through", "A pick weighs 1, with the gradient of its probability: the task trains the router."
        ),
        Option("softmax", "A pick weighs its probability.", "2101.03961"),
        Option(
            "none", "A pick weighs 1; the task does not train the router, only balance and z losses do.", "2401.16160"
        ),
    ),
    "balance": (
        Option("global_batch", "A loss on picks counted over all ranks and the whole optimizer step.", "2501.11873"),
        Option("layer", "A loss on the picks of this rank's micro-batch, layer by layer.", "2101.03961"),
        Option("sample", "A loss on the picks of each sample, all layers together, as released.", "2401.16160"),
        Option("bias", "No loss: a bias on the choice that is moved after each step.", "2408.15664"),
        Option("none", "Nothing is kept even."),
    ),
    "balance_schedule": (
        Option("constant", "balance_loss_weight from start to end."),
        Option("linear", "A straight line from balance_loss_weight to balance_final_weight."),
        Option("step", "balance_loss_weight, and balance_final_weight from half-way on.", "2406.13233"),
    ),
    "null_logits": (
        Option("own", "Each null expert has a learned logit of its own.", "2406.13233"),
        Option("shared", "The null experts of a set share one learned logit.", "2601.15370"),
    ),
    "null_balance": (
        Option("averaged", "Balance sets the sum of null picks, not which null expert takes them.", "2406.13233"),
        Option("each", "Null experts are balanced one by one, as AdaMoE's Mixtral code does."),
    ),
    "expert_path": (
        Option("masked", "Dense products over all ranks, unpicked ones masked out: few, narrow experts."),
        Option("sorted", "Real picks only, expert by expert: many or wide experts; null picks cost nothing."),
        Option("auto", "masked up to 8 experts, else sorted."),
    ),
}


def describe() -> dict[str, list[Option]]:
    """Field of MoleConfig -> what it can be set to, routers first."""
    routers = {"router": [_router(name) for name in ROUTERS]}
    return routers | {field: list(options) for field, options in OPTIONS.items()}


def _router(name: str) -> Option:
    """From the router's docstrings: the first sentence of its class, and the first paper that they name."""
    router = find_router(name)
    doc, module_doc = inspect.getdoc(router) or "", sys.modules[router.__module__].__doc__ or ""
    sentence = re.split(r"(?<=\.) ", " ".join(doc.split()))[0]
    paper = re.search(r"\d{4}\.\d{5}", f"{doc} {module_doc}")
    return Option(name, sentence, paper.group() if paper else "")
