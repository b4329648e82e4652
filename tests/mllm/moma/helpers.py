"""A Moma model of a few thousand weights, random enough that its experts matter, and a batch for it."""

import torch

from mllm.moma import MomaConfig, MomaForCausalLM

VOCAB, CODES, PAD = 40, 16, 0
FIELDS = {
    "vocab_size": VOCAB,
    "codebook_size": CODES,
    "pad_token_id": PAD,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
IDS = torch.randint(1, VOCAB, (3, 10), generator=torch.Generator().manual_seed(0))  # text 1 .. 23, image 24 .. 39
MASK = torch.tensor([[0] * 4 + [1] * 6, [1] * 10, [0] + [1] * 9])
TOKEN_CHOICE = {"routing": "token_choice", "norm_position": "expert"}


def tiny_config(preset="2t2i", **fields) -> MomaConfig:
    return MomaConfig.preset(preset, **{**FIELDS, **fields})


def tiny_moma(preset="2t2i", *, seed=0, **fields) -> MomaForCausalLM:
    """In evaluation mode, its thresholds calibrated on a batch of other tokens, where it has any."""
    torch.manual_seed(seed)
    model = MomaForCausalLM(tiny_config(preset, **fields))
    with torch.no_grad():
        model.train()(torch.randint(1, VOCAB, (4, 12)))
    return model.eval()


def with_auxiliary(model: MomaForCausalLM) -> MomaForCausalLM:
    """The same with random auxiliary routers, by which it goes in evaluation; weights learn as before."""
    model.begin_auxiliary_stage()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("auxiliary" not in name)
    return model


def scores(model, ids, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits
