"""The method on a tiny Llama: what it equals, what learns, what is saved, what is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from mllm.common.errors import UserError
from mllm.mole import MoleConfig, routing_context, routing_loss
from mllm.mole.experts import slow_experts
from tests.mllm.mole.helpers import INPUT_IDS, gradients, mole_routers, tiny_llama, tiny_mole, wake
from tests.mllm.routing.slow import slow_route

MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["straight_through", "softmax", "none"])
def test_at_initialisation_the_output_equals_the_base_bit_for_bit(gate, dtype):
    model = tiny_llama().to(dtype)
    base = model(INPUT_IDS).logits
    assert torch.equal(get_peft_model(model, MoleConfig(gate=gate))(INPUT_IDS).logits, base)


def test_a_is_initialised_per_expert_as_lora_is():
    model = tiny_mole(r=2, num_experts=3)
    A = model.base_model.model.model.layers[0].mlp.base_layer.down_proj.mole_experts["default"].A
    bound = 24**-0.5  # Kaiming-uniform with a = sqrt(5) over the 24 inputs of one expert
    assert 0.8 * bound < A.abs().max() <= bound
    assert A.shape == (3 * 2, 24)
    assert not torch.equal(A[:2], A[2:4])


def lora_twin(mole: PeftModel, use_rslora: bool) -> PeftModel:
    """PEFT's own LoRA on the same base, with the weights of the MOLE model's only expert."""
    config = LoraConfig(r=2, lora_alpha=4, use_rslora=use_rslora, target_modules=MLP + ATTENTION)
    lora = get_peft_model(tiny_llama(), config)
    weights = dict(mole.named_parameters())
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            key = name.replace(".lora_A.default.weight", ".mole_experts.default.A")
            key = key.replace(".lora_B.default.weight", ".mole_experts.default.B").replace(".mlp.", ".mlp.base_layer.")
            parameter.data.copy_(weights[key] if "lora_A" in name else weights[key].T)
    return lora


@pytest.mark.parametrize("expert_path", ["masked", "sorted"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_one_expert_equals_plain_lora_in_output_and_gradients(use_rslora, expert_path):
    mole = tiny_mole(num_experts=1, use_rslora=use_rslora, expert_path=expert_path)
    lora = lora_twin(mole, use_rslora)
    outputs = [model(INPUT_IDS, labels=INPUT_IDS) for model in (mole, lora)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-5)
    for output in outputs:
        output.loss.backward()
    left, right = gradients(mole), gradients(lora)
    for name, gradient in right.items():
        key = name.replace(".mlp.", ".mlp.base_layer.").replace(".lora_A.default.weight", ".mole_experts.default.A")
        key = key.replace(".lora_B.default.weight", ".mole_experts.default.B")
        expected = gradient if "lora_A" in name else gradient.T
        torch.testing.assert_close(left[key], expected, atol=1e-6, rtol=1e-4)
    assert len(right) == 2 * 2 * 7


@pytest.mark.parametrize("gate", ["straight_through", "softmax", "none"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_block_equals_its_definition_token_by_token(gate, top_k):
    model = tiny_mole(gate=gate, top_k=top_k)
    block = model.base_model.model.model.layers[0].mlp
    hidden = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))
    output = block(hidden)

    router = block.mole_router["default"].router
    routing = slow_route(hidden[0] @ router.weight.T + router.bias, top_k=top_k, gate=gate)

    def linear(name, x):
        layer = getattr(block.base_layer, name)
        experts = layer.mole_experts["default"]
        return slow_experts(layer.base_layer(x), x, experts.A, experts.B, routing, [2] * 4, [4 / 2] * 4)

    expected = linear(
        "down_proj", torch.nn.functional.silu(linear("gate_proj", hidden[0])) * linear("up_proj", hidden[0])
    )
    torch.testing.assert_close(output[0], expected, atol=1e-5, rtol=1e-5)


def router_gradients(model):
    return [p.grad for name, p in model.named_parameters() if "mole_router" in name]


def test_the_balance_loss_trains_the_router_under_gate_none():
    model = tiny_mole(gate="none")
    model(INPUT_IDS)
    total, parts = routing_loss(model)
    total.backward()
    assert all(gradient.abs().sum() > 0 for gradient in router_gradients(model))
    torch.testing.assert_close(total.detach(), 0.01 * parts["balance_loss"])


def test_only_experts_routers_and_lora_are_trainable():
    model = tiny_mole()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "mole_" in name}
    assert len(trainable) == 2 * (2 * 7 + 2)
    model.print_trainable_parameters()


def test_saved_and_loaded_gives_equal_logits_from_two_files(tmp_path):
    model = tiny_mole(num_experts=3, top_k=2).eval()
    logits = model(INPUT_IDS).logits
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded(INPUT_IDS).logits, logits)
    assert PeftConfig.from_pretrained(tmp_path) == loaded.peft_config["default"]


def test_an_adapter_loaded_with_empty_weights_first_is_whole(tmp_path):
    model = tiny_mole().eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_a_loaded_adapter_trains_on_only_when_asked(tmp_path):
    tiny_mole().save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    trainable = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for name, p in trainable.named_parameters() if "mole_" in name)


def test_a_disabled_adapter_is_the_base_and_routes_nothing():
    model = tiny_mole().eval()
    base = tiny_llama()(INPUT_IDS).logits
    assert not torch.equal(model(INPUT_IDS).logits, base)
    with model.disable_adapter():
        assert torch.equal(model(INPUT_IDS).logits, base)
        assert routing_loss(model) == (0, {})
    assert not torch.equal(model(INPUT_IDS).logits, base)


@pytest.mark.parametrize("router_input", ["block", "linear"])
def test_unloading_gives_the_base_back(router_input):
    model = tiny_mole(router_input=router_input).eval()
    base = model.unload()
    assert not any("mole" in name for name, _ in base.named_modules())
    assert torch.equal(base(INPUT_IDS).logits, tiny_llama()(INPUT_IDS).logits)


def test_a_copied_model_has_a_routing_of_its_own():
    model = tiny_mole()
    model(INPUT_IDS)
    twin = copy.deepcopy(model)
    assert routing_context(twin).routings == {}
    twin(INPUT_IDS[:1])
    assert routing_context(twin).batch_size == 1
    assert routing_context(model).batch_size == 3


def test_bf16_base_keeps_adapters_and_router_in_fp32_and_runs_with_and_without_autocast():
    model = get_peft_model(tiny_llama().to(torch.bfloat16), MoleConfig(r=2))
    wake(model).train()
    assert {p.dtype for name, p in model.named_parameters() if "mole_" in name} == {torch.float32}
    plain = model(INPUT_IDS, labels=INPUT_IDS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(INPUT_IDS, labels=INPUT_IDS)
    assert plain.logits.dtype == torch.bfloat16
    assert abs(plain.loss - cast.loss) < 0.02  # seen 0.003
    (plain.loss + cast.loss).backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_a_model_cast_to_bf16_keeps_its_routers_weights_and_probabilities_in_fp32():
    model = tiny_mole()
    before = [p.clone() for name, p in model.named_parameters() if "mole_router" in name]
    model.to(torch.bfloat16)
    after = [p for name, p in model.named_parameters() if "mole_router" in name]
    assert all(
        torch.equal(left, right) and right.dtype == torch.float32 for left, right in zip(before, after, strict=True)
    )
    model(INPUT_IDS)
    assert routing_context(model).stack("router_probs_TX").dtype == torch.float32


def test_autocast_does_not_reach_the_router():
    model = tiny_mole().eval()
    router, hidden = mole_routers(model)[0], torch.randn(5, 16)
    expected = router(hidden, routing_context(model))
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(hidden, routing_context(model))
    assert torch.equal(routing.router_logits_TX, expected.router_logits_TX)
    assert torch.equal(routing.expert_weights_TK, expected.expert_weights_TK)


def test_a_model_without_mole_has_no_routing():
    assert routing_context(tiny_llama()) is None
    assert routing_loss(tiny_llama()) == (0, {})


def test_no_loss_with_a_weight_is_no_routing_loss():
    model = tiny_mole(balance="none")
    model(INPUT_IDS)
    assert routing_loss(model) == (0, {})


def test_named_blocks_and_linears_are_the_only_ones_adapted():
    model = tiny_mole(expert_modules=["1.mlp"], target_modules=r".*layers\.0\.self_attn\.q_proj")
    adapted = {
        name.split(".mole_")[0].removeprefix("base_model.model.model.")
        for name, _ in model.named_parameters()
        if "mole_" in name
    }
    assert adapted == {
        "layers.0.self_attn.q_proj",
        "layers.1.mlp",
        *(f"layers.1.mlp.base_layer.{name}" for name in MLP),
    }


def test_no_target_modules_means_experts_alone():
    assert not any(
        "self_attn" in name for name, _ in tiny_mole(target_modules=[]).named_parameters() if "mole_" in name
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["up_proj"]}, "up_proj belongs to a block that carries experts"),
        ({"target_modules": ["query"]}, "matches no module"),
        ({"target_modules": ["self_attn"]}, "is not a linear"),
        ({"expert_modules": ["ffn"]}, "matches no module"),
        ({"expert_modules": ["input_layernorm"]}, "holds no linear of its own"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused_by_name(config, said):
    with pytest.raises(UserError, match=said):
        get_peft_model(tiny_llama(), MoleConfig(**config))


def test_merging_is_refused_with_the_reason():
    for merge in ("merge_and_unload", "merge_adapter"):
        with pytest.raises(UserError, match="each token takes its own experts"):
            getattr(tiny_mole(), merge)()


def test_a_second_adapter_is_refused_and_the_first_still_works():
    model = tiny_mole().eval()
    logits = model(INPUT_IDS).logits
    with pytest.raises(UserError, match="one adapter a model"):
        model.add_adapter("second", MoleConfig())
    assert torch.equal(model(INPUT_IDS).logits, logits)
