"""A tiny Llama with MOLE, and experts that already do something."""

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mllm.mole import MoleConfig

VOCAB = 50
INPUT_IDS = torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, pad_token_id=0, **(sizes | overrides))
    return LlamaForCausalLM(config).eval()


def wake(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Give every B a random value, so that experts matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "mole_experts" in name and name.endswith(".B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def tiny_mole(seed: int = 0, **config) -> PeftModel:
    """A tiny Llama with awake experts, in train mode."""
    torch.manual_seed(seed)
    return wake(get_peft_model(tiny_llama(seed), MoleConfig(**({"r": 2, "lora_alpha": 4} | config)))).train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
