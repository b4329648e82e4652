"""Language-model families of transformers, in tiny random form."""

import pytest
import torch
import transformers
from peft import get_peft_model

from mllm.common.errors import UserError
from mllm.mole import MoleConfig, routing_context, routing_loss
from tests.mllm.mole.helpers import INPUT_IDS, VOCAB, wake

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "Llama": COMMON,
    "Mistral": COMMON,
    "Qwen2": COMMON,
    "Qwen3": COMMON,
    "Gemma2": COMMON,
    "Phi": COMMON,
    "Phi3": COMMON,
    "GPTNeoX": COMMON,
    "Olmo2": COMMON,
    "StableLm": COMMON,
    "Granite": COMMON,
    "Cohere": COMMON,
    "Starcoder2": COMMON,
    "Glm4": COMMON,
    "SmolLM3": COMMON,
    "Falcon": {k: v for k, v in COMMON.items() if k not in ("head_dim", "intermediate_size")},
    "Bloom": {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "GPT2": GPT,
    "GPTJ": GPT | {"rotary_dim": 4},
}


def tiny(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_starts_as_its_base_routes_every_layer_and_trains_every_expert(family):
    model = tiny(family)
    base = model(INPUT_IDS).logits
    model = get_peft_model(model, MoleConfig(r=2, num_experts=2, top_k=2)).eval()
    assert torch.equal(model(INPUT_IDS).logits, base)

    wake(model)
    loss = model(INPUT_IDS, labels=INPUT_IDS).loss
    assert len(routing_context(model).layers) == 2
    (loss + routing_loss(model)[0]).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    attention = [n for n, _ in model.named_parameters() if "mole_experts" in n and "mlp" not in n]
    assert len(attention) >= 2 * 2 * 2


def test_a_family_with_linears_in_the_layer_itself_is_refused_by_name():
    config = transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match=r"OPTDecoderLayer.*fc1, fc2"):
        get_peft_model(transformers.OPTForCausalLM(config), MoleConfig())


@pytest.mark.parametrize("router_input", ["block", "linear"])
@pytest.mark.parametrize("expert_path", ["masked", "sorted"])
@pytest.mark.parametrize("family", ["Llama", "Phi3", "GPT2", "GPTNeoX"])  # gate and up apart, fused, Conv1D, no gate
def test_null_experts_on_either_path_and_either_router_input_train_in_every_kind_of_block(
    family, expert_path, router_input
):
    model = tiny(family)
    base = model(INPUT_IDS).logits
    config = MoleConfig(
        r=2, num_experts=2, num_null_experts=2, top_k=2, expert_path=expert_path, router_input=router_input
    )
    model = wake(get_peft_model(model, config))
    assert not torch.equal(model(INPUT_IDS).logits, base)
    loss = model(INPUT_IDS, labels=INPUT_IDS).loss
    linears = {"Llama": 3}.get(family, 2)
    assert len(routing_context(model).layers) == (2 if router_input == "block" else 2 * linears)
    (loss + routing_loss(model)[0]).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    with model.disable_adapter():
        assert torch.equal(model(INPUT_IDS).logits, base)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("Mixtral", {"num_local_experts": 2}),
        ("Olmoe", {"num_experts": 2, "num_experts_per_tok": 1}),
        ("Qwen3Moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}),
    ],
)
def test_a_mixture_of_experts_is_refused_by_name(family, sizes):
    config = getattr(transformers, f"{family}Config")(**COMMON, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=rf"{family}DecoderLayer.*mixtures of experts"):
        get_peft_model(model, MoleConfig())
