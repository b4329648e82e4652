"""Models grown from a smaller one, and what they keep of it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mllm.common.errors import UserError
from mllm.moma import from_language_model, upcycle
from tests.mllm.moma.helpers import FIELDS, IDS, scores, tiny_moma

TEXT = torch.randint(1, 20, (2, 8), generator=torch.Generator().manual_seed(0))
GROUPS = {"dense": {"text": 2, "image": 1, "shared": 1}, "1t1i": {"text": 3, "image": 2}}


def with_all_chosen(model):
    """Every expert takes every token of its modality."""
    for name, buffer in model.named_buffers():
        if name.endswith(".ffn.router.threshold"):
            buffer.zero_()
    return model.eval()


def tiny_llama(**fields):
    torch.manual_seed(0)
    shape = {name: value for name, value in FIELDS.items() if name != "codebook_size"}
    return LlamaForCausalLM(LlamaConfig(**shape | {"num_key_value_heads": 1, **fields})).eval()


@pytest.mark.parametrize("preset", GROUPS)
def test_with_a_post_norm_tokens_that_some_expert_took_keep_the_seeds_value(preset):
    seed = tiny_moma(preset)
    model = with_all_chosen(upcycle(seed, GROUPS[preset], router_noise=0.0))
    assert model.config.layout.num_experts > 2
    # The norm's epsilon keeps the gates from cancelling exactly: worst difference 3e-5.
    torch.testing.assert_close(scores(model, IDS), scores(seed, IDS), rtol=1e-3, atol=1e-3)


def test_without_it_the_routed_output_is_the_seeds_times_the_sum_of_gates():
    seed = tiny_moma("1t1i", norm_position="pre")
    model = with_all_chosen(upcycle(seed, {"text": 4, "image": 2}, router_noise=0.0))
    ffn, hidden = model.model.layers[1].ffn, torch.randn(*IDS.shape, 16)
    with torch.no_grad():
        ffn.router.weight.zero_()  # σ(0): every gate is a half
        for made in (seed, model):
            made.routing_context.begin(mode="threshold", input_ids=IDS)
        gates_BS1 = 0.5 * torch.tensor([4, 2])[(IDS >= 24).long()][..., None]
        torch.testing.assert_close(ffn(hidden), gates_BS1 * seed.model.layers[1].ffn(hidden))


def test_everything_but_experts_and_their_routers_is_the_seeds_and_the_seed_is_left_alone():
    seed = tiny_moma("1t1i", mixture_of_depths=0.5)
    before = {name: tensor.clone() for name, tensor in seed.state_dict().items()}
    model = upcycle(seed, GROUPS["1t1i"])
    for name, tensor in model.state_dict().items():
        if ".ffn." not in name:
            assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in seed.state_dict().items())


def test_each_expert_is_its_groups_and_fresh_groups_are_none():
    seed = tiny_moma("1t1i")
    made = upcycle(seed, {"text": 2, "image": 2}, fresh=("image",)).model.layers[0].ffn.experts.down_proj
    old = seed.model.layers[0].ffn.experts.down_proj
    assert torch.equal(made[0], old[0])
    assert torch.equal(made[1], old[0])
    assert not any(torch.equal(made[e], old[i]) for e in (2, 3) for i in (0, 1))


def test_noise_lets_copies_grow_apart():
    model = upcycle(tiny_moma("1t1i"), {"text": 2, "image": 2}).train()
    assert model.config.router_noise == 1
    model(IDS, labels=IDS).loss.backward()
    gradient = model.model.layers[0].ffn.experts.down_proj.grad
    assert not torch.allclose(gradient[0], gradient[1])


def test_the_new_model_may_route_in_another_way():
    model = upcycle(
        tiny_moma("1t1i"), {"text": 2, "image": 2}, router_noise=0.0, routing="token_choice", norm_position="expert"
    )
    assert model.eval().routing_mode == "token"
    assert model.generate(IDS, max_new_tokens=1).shape == (3, 11)


@pytest.mark.parametrize(
    ("preset", "groups", "options", "match"),
    [
        ("2t2i", {"text": 4, "image": 4}, {}, "one expert a group"),
        ("1t1i", {"text": 2, "image": 2, "shared": 1}, {}, "no expert for the group 'shared'"),
        ("1t1i", {"text": 2, "image": 2}, {"fresh": ("audio",)}, "fresh names the group 'audio'"),
        ("1t1i", {"text": 2, "image": 2}, {"num_hidden_layers": 4}, "weights decide num_hidden_layers"),
        ("1t1i", {"text": 2, "image": 2}, {"rooting": "token_choice"}, "no field 'rooting'"),
    ],
)
def test_what_a_seed_cannot_give_is_refused(preset, groups, options, match):
    with pytest.raises(UserError, match=match):
        upcycle(tiny_moma(preset), groups, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [{}, {"image_side": 2}])
def test_a_llama_turned_into_moma_computes_on_text_what_it_did(tied, fields):
    llama = tiny_llama(tie_word_embeddings=tied)
    model = from_language_model(llama, codebook_size=6, **fields).eval()
    words = llama.config.vocab_size
    assert (model.config.image_token_start, model.config.vocab_size) == (words + 2, words + 8)
    torch.testing.assert_close(scores(model, TEXT)[..., :words], scores(llama, TEXT))


def test_a_llamas_text_stays_so_where_its_copy_is_the_only_text_expert():
    llama = tiny_llama()
    model = upcycle(from_language_model(llama, codebook_size=6), {"text": 1, "image": 3}, fresh=("image",)).eval()
    torch.testing.assert_close(scores(model, TEXT)[..., : llama.config.vocab_size], scores(llama, TEXT))


def test_other_families_are_refused():
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    with pytest.raises(UserError, match="takes a Llama"):
        from_language_model(Qwen2ForCausalLM(Qwen2Config(vocab_size=9, intermediate_size=8, **shape)), codebook_size=4)
