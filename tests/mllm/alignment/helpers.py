"""Models with routers, all of them tiny, and rows of two tasks for them."""

import torch

from mllm.alignment import TokenRows, prepare
from mllm.data.template import IGNORED
from mllm.mole import MoleConfig
from tests.mllm.mole.helpers import tiny_llama, wake
from tests.mllm.mole.test_native_moe import tiny_moe

VOCAB = 50
MOLES = {
    "plain": {"num_experts": 3},
    "nulls": {"num_experts": 3, "num_null_experts": 2, "top_k": 2, "gate": "softmax"},
    "shared_nulls": {"num_experts": 3, "num_null_experts": 2, "null_logits": "shared", "top_k": 2},
    "linear": {"num_experts": 3, "router_input": "linear"},
}
NATIVES = ("mixtral", "olmoe", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3_groups")


def tiny_mole(**config):
    """A Llama of three layers with experts that do something, ready to be aligned."""
    from peft import get_peft_model

    torch.manual_seed(0)
    made = MoleConfig(**({"r": 2, "lora_alpha": 4, "num_experts": 3} | config))
    model = wake(get_peft_model(tiny_llama(num_hidden_layers=3), made)).eval()
    for name, parameter in model.named_parameters():
        if "mole_router" in name:
            parameter.data.mul_(4)  # routers that prefer some experts clearly
    return model


def tiny(kind: str):
    """A MOLE model or a native mixture of experts, by name."""
    return tiny_mole(**MOLES[kind]) if kind in MOLES else prepare(tiny_moe(kind))


def token_rows(number: int = 12, side: str = "right", seed: int = 0) -> TokenRows:
    """Prompts of 3 to 7 tokens and answers of 1 to 2, of two tasks that differ in their first token."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels, domains = [], [], []
    for row in range(number):
        prompt = torch.randint(10, VOCAB, (3 + row % 5,), generator=generator)
        prompt[0] = 2 + row % 2
        answer = torch.randint(4, 9, (1 + row % 2,), generator=generator)
        ids.append(torch.cat([prompt, answer]))
        labels.append(torch.cat([torch.full_like(prompt, IGNORED), answer]))
        domains.append(("even", "odd")[row % 2])
    return TokenRows(ids, labels, domains, side=side)
