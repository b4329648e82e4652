"""Many experts from few: a model of one expert a group, or an ordinary language model, as the seed of a larger one.

    seed = MomaForCausalLM(MomaConfig.preset("1t1i"))            # trained for a while (MoMa, 2407.21770, section 2.5)
    model = upcycle(seed, {"text": 4, "image": 4})

    dense = from_language_model(LlamaForCausalLM.from_pretrained(…), codebook_size=8192)
    model = upcycle(dense, {"text": 2, "image": 2}, fresh=("image",))

E experts, I inner width, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mllm.common.errors import UserError
from mllm.moma.config import MomaConfig, refuse_unknown
from mllm.moma.modeling import MomaForCausalLM
from mllm.routing.layout import ALL

# Fields that a seed's weights and vocabulary fix.
SHAPE = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "codebook_size", "image_token_start", "begin_image_token_id", "end_image_token_id", "image_side",
    "expert_groups",
}  # fmt: skip
MLP = ("gate_proj", "up_proj", "down_proj")


def upcycle(
    seed: MomaForCausalLM,
    expert_groups: dict[str, int],
    *,
    router_noise: float | None = None,
    fresh: tuple[str, ...] = (),
    **changes: Any,
) -> MomaForCausalLM:
    """A model with these experts, each a copy of its group's in the seed, with new routers; the seed is left alone.

    The seed has one expert a group: dense (any groups can follow) or 1t1i (text and image groups). With noise off, a
    token's routed output is the seed's times the sum of its gates (σ of the logit: 1/2 each where the router is near
    zero), and nothing where no expert took it. With norm_position "post" the norm cancels that sum, so every token that
    some expert took keeps the seed's value.

    Args:
        router_noise: τ of the Gumbel-sigmoid noise by which copies grow apart. None: 1, MoMa gives no other value, or
            0 where tokens choose, whose routers know no noise.
        fresh: groups whose experts start at random instead, as the image experts of a text model may.
        changes: other fields of the new config, such as routing; auxiliary routers come with a stage of their own.

    The optimizer and its schedule start anew, the data go on where they were: that is the trainer's part. Raises
    UserError for a seed of another form, for groups it has no expert for, and for fields that there are not.
    """
    config = upcycled_config(
        seed.config, expert_groups=expert_groups, router_noise=router_noise, fresh=fresh, **changes
    )
    source_E = _sources(seed.config, expert_groups, fresh)
    model = MomaForCausalLM(config)
    model.to(device=seed.device, dtype=seed.dtype)
    state = {name: tensor for name, tensor in seed.state_dict().items() if _is_kept(name)}
    for layer in range(seed.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.ffn"
        experts = model.get_submodule(prefix).experts
        for name, seed_tensor in _seed_experts(state, prefix, is_dense=seed.config.is_dense).items():
            own = getattr(experts, name).detach()
            copies = [own[e] if source is None else seed_tensor[source] for e, source in enumerate(source_E)]
            state[f"{prefix}.experts.{name}"] = torch.stack(copies)
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [name for name in missing if "router" not in name]
    if lost or unexpected:
        raise UserError(f"The seed's weights do not fit these changes: {[*lost, *unexpected][:4]} …")
    return model


def upcycled_config(
    seed: MomaConfig,
    expert_groups: dict[str, int],
    *,
    router_noise: float | None = None,
    fresh: tuple[str, ...] = (),
    **changes: Any,
) -> MomaConfig:
    """The config of what `upcycle` makes. Raises UserError as that does."""
    refuse_unknown(changes)
    if fixed := sorted(SHAPE & changes.keys()):
        raise UserError(f"The seed's weights decide {fixed[0]}: leave it out.")
    if changes.get("causal_routing") == "aux":
        raise UserError('causal_routing="aux" goes by auxiliary routers, which learn later: begin_auxiliary_stage().')
    _sources(seed, expert_groups, fresh)
    if router_noise is None:
        router_noise = 0.0 if changes.get("routing", seed.routing) == "token_choice" else 1.0
    settings = {**seed.to_dict(), "causal_routing": "threshold", "router_noise": router_noise, **changes}
    return MomaConfig.from_dict({**settings, "expert_groups": expert_groups})


def _is_kept(name: str) -> bool:
    """All but expert routers and auxiliary routers; a depth router works on as it did."""
    return ".ffn.router." not in name and ".auxiliary." not in name


def _sources(config: MomaConfig, expert_groups: dict[str, int], fresh: tuple[str, ...]) -> list[int | None]:
    """[E] the seed's expert that each new one copies; None for a fresh one."""
    if not config.is_modal:
        raise UserError(f"A seed has one expert a group, dense or 1t1i; this one has {config.expert_groups}.")
    layout = MomaConfig(expert_groups=expert_groups).layout
    unknown = [name for name in fresh if name not in layout.groups]
    if unknown:
        raise UserError(f"fresh names the group {unknown[0]!r}; the new groups are {', '.join(layout.groups)}.")
    sources: list[int | None] = []
    for group in layout.group_of_expert:
        if group in fresh:
            sources.append(None)
        elif config.is_dense:
            sources.append(0)
        elif group in config.layout.groups:
            sources.append(config.layout.group_of_expert.index(group))
        else:
            raise UserError(
                f"A 1t1i seed has no expert for the group {group!r}; make it fresh, or seed from a dense model."
            )
    return sources


def _seed_experts(state: dict[str, Tensor], prefix: str, *, is_dense: bool) -> dict[str, Tensor]:
    """Takes a layer's expert weights out of the state, stacked: gate_up_proj [E, 2I, D], down_proj [E, D, I]."""
    if not is_dense:
        return {name: state.pop(f"{prefix}.experts.{name}") for name in ("gate_up_proj", "down_proj")}
    gate, up, down = (state.pop(f"{prefix}.{name}.weight") for name in MLP)
    return {"gate_up_proj": torch.cat([gate, up])[None], "down_proj": down[None]}


def from_language_model(model: LlamaForCausalLM, *, codebook_size: int, **changes: Any) -> MomaForCausalLM:
    """A Llama as a dense Moma model that also knows image tokens; on text it computes what it did.

    The two markers and `codebook_size` codes follow its vocabulary, their embeddings drawn afresh. norm_position is
    "pre", which the weights expect. `changes` are other fields of the config; groups come with `upcycle`.
    Raises UserError for another family, whose attention these parts do not compute, and for FFNs with biases.
    """
    words = model.config.vocab_size
    moma = MomaForCausalLM(language_model_config(model.config, codebook_size=codebook_size, **changes))
    moma.to(device=model.device, dtype=model.dtype)
    state = {name: tensor for name, tensor in moma.state_dict().items() if "embed_places" in name}
    state |= {_renamed(name): tensor for name, tensor in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], moma.get_parameter(name).detach()[words:]])
    moma.load_state_dict(state)
    return moma


def language_model_config(config: LlamaConfig, *, codebook_size: int, **changes: Any) -> MomaConfig:
    """The config of what `from_language_model` makes. Raises UserError as that does."""
    refuse_unknown(changes)
    if config.model_type != "llama" or config.mlp_bias:
        raise UserError(
            f"from_language_model takes a Llama without MLP biases (Llama 2 and 3, SmolLM, TinyLlama …), got "
            f"{config.model_type}."
        )
    words = config.vocab_size
    settings = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    settings |= {
        "vocab_size": words + 2 + codebook_size,
        "begin_image_token_id": words,
        "end_image_token_id": words + 1,
        "image_token_start": words + 2,
        "codebook_size": codebook_size,
        "expert_groups": {ALL: 1},
        "norm_position": "pre",
    }
    return MomaConfig.from_dict({**settings, **changes})


def _renamed(name: str) -> str:
    return (
        name.replace("input_layernorm", "attention_norm")
        .replace("post_attention_layernorm", "ffn_norm")
        .replace(".mlp.", ".ffn.")
    )
