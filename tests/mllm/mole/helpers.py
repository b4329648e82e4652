"""A tiny Llama with MOLE, a toy smaller still, and experts that already do something."""

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from mllm.mole import MoleConfig

VOCAB, IMAGE = 50, 9
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


def mole_routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Every TokenRouter, in the order of the layers."""
    return [module.mole_router["default"] for module in model.modules() if getattr(module, "mole_router", None)]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class ToyBlock(nn.Module):
    """An MLP of Llama's kind, 6 wide."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Toy(nn.Module):
    """Two blocks side by side on the same embeddings, so that no block routes by another one's rounding."""

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig(image_token_id=IMAGE)
        self.embed = nn.Embedding(VOCAB, 6)
        self.blocks = nn.ModuleList([ToyBlock(), ToyBlock()])

    def forward(self, input_ids, attention_mask=None, offset=0):
        """`offset` is added to the embeddings: by its gradient one sees theirs."""
        hidden = self.embed(input_ids) + offset
        return hidden + self.blocks[0](hidden) + self.blocks[1](hidden)


def toy_mole(seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> PeftModel:
    """The toy with awake experts and nothing else, in train mode. Raises UserError as MoleConfig does."""
    made = MoleConfig(expert_modules=r"blocks\.\d+", target_modules=[], **({"r": 2, "lora_alpha": 3} | config))
    torch.manual_seed(seed)
    return wake(get_peft_model(Toy().to(dtype), made), seed).train()
