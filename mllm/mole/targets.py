"""Which modules of a model carry experts and which carry plain LoRA.

A block is the child of a decoder layer that holds at least two linears and is not attention: Llama's `mlp`, MPT's
`ffn`. Everything is looked for inside the language model only: an unanchored `mlp` would also match a vision tower's
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mllm.common.errors import UserError
from mllm.common.names import check_names, matches
from mllm.mole.config import MoleConfig

LINEARS = (nn.Linear, Conv1D)  # bitsandbytes' linears are nn.Linear too; Conv1D is GPT-2's


@dataclass(frozen=True)
class Targets:
    """Full module names.

    `blocks` maps a block that is routed once to its short name inside the language model ("layers.0.mlp"),
    `routed_linears` a linear that has a router of its own to its short name; `linears` carry plain LoRA.
    """

    blocks: dict[str, str]
    routed_linears: dict[str, str]
    linears: list[str]


def find_targets(model: nn.Module, config: MoleConfig) -> Targets:
    """Resolve `expert_modules` and `target_modules` against `model`.

    Raises UserError naming the model, the module and the reason when nothing matches, a block has no linears of its
    own, or a linear would carry both experts and plain LoRA.
    """
    root = _language_model_name(model)
    inside = {name: module for name, module in model.named_modules() if _is_inside(name, root)}
    if config.expert_modules is None:
        blocks = _mlp_blocks(model, root)
    else:
        blocks = [name for name in inside if matches(config.expert_modules, name)]
        _check_blocks(config.expert_modules, blocks, inside)
    if config.target_modules is None:
        linears = _attention_linears(model, root)
    else:
        linears = [name for name in inside if matches(config.target_modules, name)]
        _check_linears(config.target_modules, linears, inside)
    for name in linears:
        if any(_is_inside(name, block) for block in blocks):
            raise UserError(
                f"{name} belongs to a block that carries experts and is asked to carry plain LoRA too. Take it out of "
                "target_modules or its block out of expert_modules."
            )
    if config.router_input == "block":
        return Targets(_short(blocks, root), {}, linears)
    routed = [f"{block}.{linear}" for block in blocks for linear in block_linears(inside[block])]
    return Targets({}, _short(routed, root), linears)


def _short(names: list[str], root: str) -> dict[str, str]:
    return {name: name.removeprefix(f"{root}.") for name in names}


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear, whatever its class keeps them as."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def block_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linears a block holds itself, in the order of its definition; the first one reads the block's input."""
    return {name: child for name, child in block.named_children() if isinstance(child, LINEARS)}


def _is_inside(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _language_model_name(model: nn.Module) -> str:
    """Name of the decoder inside a transformers model, "" for any other module (then everything counts as inside)."""
    if not isinstance(model, PreTrainedModel):
        return ""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def _decoder_layers(model: nn.Module, root: str) -> dict[str, nn.Module]:
    decoder = model.get_submodule(root)
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) > 0:
            prefix = f"{root}.{name}" if root else name
            return {f"{prefix}.{index}": layer for index, layer in enumerate(child)}
    raise UserError(
        f"{type(model).__name__}: no list of decoder layers found, so its MLP blocks and attention projections are not "
        "known. Name them with MoleConfig(expert_modules=..., target_modules=...)."
    )


def _is_attention(name: str, module: nn.Module) -> bool:
    return "attn" in name.lower() or "attention" in name.lower() or "attention" in type(module).__name__.lower()


def _mlp_blocks(model: nn.Module, root: str) -> list[str]:
    blocks = []
    for layer_name, layer in _decoder_layers(model, root).items():
        found = [
            f"{layer_name}.{name}"
            for name, child in layer.named_children()
            if not _is_attention(name, child) and len(block_linears(child)) >= 2
        ]
        if not found:
            raise UserError(_why_no_block(layer_name, layer))
        blocks += found
    return blocks


def _why_no_block(layer_name: str, layer: nn.Module) -> str:
    where = f"{layer_name} ({type(layer).__name__}) has no MLP block that can carry experts: "
    if len(block_linears(layer)) >= 2:
        names = ", ".join(block_linears(layer))
        return (
            where
            + f"it keeps its linears ({names}) in the layer itself, so there is no block whose input could be routed. "
            "This model family is not supported."
        )
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
    return where + (
        f"none of its parts holds two linears of its own. Parts: {children}. Blocks that are mixtures of experts "
        "already are not supported; where only some layers are, name the others with MoleConfig(expert_modules=...)."
    )


def _attention_linears(model: nn.Module, root: str) -> list[str]:
    return [
        f"{layer_name}.{name}.{linear}"
        for layer_name, layer in _decoder_layers(model, root).items()
        for name, child in layer.named_children()
        if _is_attention(name, child)
        for linear in _linears_below(child)
    ]


def _linears_below(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, LINEARS)]


def _check_blocks(patterns: list[str] | str, blocks: list[str], inside: dict[str, nn.Module]) -> None:
    check_names("MoleConfig.expert_modules", patterns, inside, where="module of the language model")
    if not blocks:
        raise UserError("MoleConfig.expert_modules is empty, so there is nothing to route; leave it out for the MLPs.")
    for name in blocks:
        if not block_linears(inside[name]):
            raise UserError(
                f"MoleConfig.expert_modules={patterns!r} matches {name} ({type(inside[name]).__name__}), which holds "
                "no linear of its own. Name the block around the linears, as in ['mlp']."
            )


def _check_linears(patterns: list[str] | str, linears: list[str], inside: dict[str, nn.Module]) -> None:
    check_names("MoleConfig.target_modules", patterns or [], inside, where="module of the language model")
    for name in linears:
        if not isinstance(inside[name], LINEARS):
            raise UserError(
                f"MoleConfig.target_modules={patterns!r} matches {name} ({type(inside[name]).__name__}), which is not "
                "a linear."
            )
