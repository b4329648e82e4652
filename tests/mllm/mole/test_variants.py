"""Variants of the experts, routers and balance on a tiny Llama: shapes, saving and loading, other base linears."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from mllm.mole import BiasBalance, MoleConfig, routing_context, routing_loss
from mllm.routing import ROUTERS, BalanceWindow, find_router
from tests.mllm.mole.helpers import IMAGE, INPUT_IDS, VOCAB, mole_routers, tiny_llama, tiny_mole, toy_mole, wake
from tests.tiny import tiny_image, tiny_llava

DOMAINS = ["general", "document", "general"]
VARIANTS = {
    "groups, a rank each, named out of order": {
        "expert_groups": {"text": 2, "shared": 1, "image": 1},
        "r": {"text": 3, "shared": 1, "image": 2},
        "num_null_experts": {"text": 1, "image": 2},
        "top_k": 2,
    },
    "shared A": {"shared_a": True, "top_k": 2},
    "rsLoRA, sorted": {"use_rslora": True, "expert_path": "sorted"},
    "a router a linear": {"router_input": "linear", "num_null_experts": 2, "top_k": 2},
    "shared null logit and prior": {"num_null_experts": 3, "null_logits": "shared", "modality_prior": True, "top_k": 2},
    "bias balance": {"balance": "bias", "num_null_experts": 1},
}


def of_router(name):
    """The least a config must say to have that router."""
    config = {"router": name} | ({"expert_domains": ["general", "document"]} if name == "oracle_domain" else {})
    return config | ({} if find_router(name).learns else {"balance": "none"})


VARIANTS |= {f"router {name}": of_router(name) for name in ROUTERS}


def base_with_pictures():
    model = tiny_llama()
    model.config.image_token_id = IMAGE  # so that ids 9 count as image tokens
    return model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_and_loaded_variant_gives_equal_logits(name, low_cpu_mem_usage, tmp_path):
    model = wake(get_peft_model(base_with_pictures(), MoleConfig(**({"r": 2} | VARIANTS[name])))).eval()
    with torch.no_grad():
        for router in mole_routers(model):
            for tensor in router.state_dict().values():
                tensor.add_(torch.randn_like(tensor))  # as if trained; buffers too
    routing_context(model).set_domains(DOMAINS)
    logits = model(INPUT_IDS).logits
    model.save_pretrained(tmp_path)

    torch.manual_seed(99)  # what is drawn at loading must not matter
    loaded = PeftModel.from_pretrained(base_with_pictures(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    routing_context(loaded).set_domains(DOMAINS)
    assert torch.equal(loaded(INPUT_IDS).logits, logits)
    assert not torch.equal(tiny_llama()(INPUT_IDS).logits, logits)


@pytest.mark.parametrize("name", ROUTERS)
def test_cached_generation_routes_every_token_as_one_full_forward_does(name):
    base, processor = tiny_llava()
    torch.manual_seed(0)
    model = wake(get_peft_model(base, MoleConfig(r=2, num_experts=3, top_k=2, **of_router(name)))).eval()
    context, seen = routing_context(model), []
    context.set_domains(["general", "document"])
    processor.tokenizer.padding_side = "left"
    prompts = ["USER: <image>\nWhat colour is the square? ASSISTANT:", "USER: <image>\nyes no ASSISTANT: red"]
    inputs = processor(images=[tiny_image(), tiny_image("blue")], text=prompts, padding=True, return_tensors="pt")
    hook = model.get_base_model().register_forward_hook(
        lambda *_: seen.append(context.stack("expert_ids_TK").unflatten(1, (2, -1)))
    )
    ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    step_by_step_LBSK = torch.cat(seen, 2)
    mask = torch.cat([inputs.attention_mask, torch.ones(2, 3, dtype=torch.long)], 1)
    model(input_ids=ids[:, :-1], attention_mask=mask, pixel_values=inputs.pixel_values)
    hook.remove()
    # what stands in the padding is nobody's token
    assert torch.equal(seen[-1][:, mask.bool()], step_by_step_LBSK[:, mask.bool()])


def experts_of(model, linear="down_proj"):
    return getattr(model.base_model.model.model.layers[0].mlp.base_layer, linear).mole_experts["default"]


def test_with_a_rank_a_group_every_expert_has_its_groups_rank():
    config = VARIANTS["groups, a rank each, named out of order"]
    experts = experts_of(wake(get_peft_model(base_with_pictures(), MoleConfig(**config))))
    assert experts.ranks == [3, 3, 2, 1]  # text, text, image, shared
    assert (experts.A.shape, experts.B.shape) == ((9, 24), (9, 16))
    assert experts.scalings == [32 / 3, 32 / 3, 16, 32]


def test_with_a_shared_a_a_linear_has_one_a_and_a_b_an_expert():
    experts = experts_of(tiny_mole(shared_a=True, num_experts=3))
    assert (experts.A.shape, experts.B.shape) == ((2, 24), (3 * 2, 16))


def test_with_a_router_a_linear_each_linear_decides_from_its_own_input():
    model = tiny_mole(router_input="linear")
    model(INPUT_IDS)
    names = [f"layers.{n}.mlp.{linear}" for n in (0, 1) for linear in ("gate_proj", "up_proj", "down_proj")]
    assert sorted(routing_context(model).layers) == sorted(names)
    assert [router.router.weight.shape[1] for router in mole_routers(model)] == [16, 16, 24] * 2
    gate, up = (routing_context(model).routings[names[n]].router_logits_TX for n in (0, 1))
    assert not torch.equal(gate, up)


@pytest.mark.parametrize("expert_path", ["masked", "sorted"])
def test_dropout_acts_on_experts_in_training_only(expert_path):
    model = tiny_mole(lora_dropout=0.5, target_modules=[], expert_path=expert_path)
    assert not torch.equal(model(INPUT_IDS).logits, model(INPUT_IDS).logits)
    model.eval()
    assert torch.equal(model(INPUT_IDS).logits, model(INPUT_IDS).logits)


class Int8Linear(nn.Linear):
    """Holds what quantised linears hold: int8 weights, a scale a row, no gradient for either."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantised_llama():
    model = tiny_llama()
    for name, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            model.model.set_submodule(name, Int8Linear(module))
    return model


@pytest.mark.parametrize("router_input", ["block", "linear"])
@pytest.mark.parametrize("expert_path", ["masked", "sorted"])
def test_a_quantised_base_carries_experts_in_floating_point_and_trains_them(expert_path, router_input, tmp_path):
    expected = quantised_llama()(INPUT_IDS).logits
    config = MoleConfig(r=2, expert_path=expert_path, router_input=router_input, num_null_experts=1, top_k=2)
    model = get_peft_model(quantised_llama(), config)
    assert torch.equal(model(INPUT_IDS).logits, expected)
    wake(model).train()
    assert {p.dtype for name, p in model.named_parameters() if "mole_" in name} == {torch.float32}
    loss = model(INPUT_IDS, labels=INPUT_IDS).loss
    (loss + routing_loss(model)[0]).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    logits = model.eval()(INPUT_IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(quantised_llama(), tmp_path)(INPUT_IDS).logits, logits)


# -- balance that is not a loss, weights on their way, the step's window -----------------------------------------------


@pytest.mark.parametrize("real_share", [None, 0.25])
def test_bias_balance_brings_every_layers_load_to_its_target_without_a_loss(real_share):
    model = toy_mole(balance="bias", num_null_experts=1, real_share=real_share, bias_update_rate=0.01)
    ids = torch.randint(VOCAB, (8, 40))
    target_X = model.peft_config["default"].target.share_PX[0]
    with torch.no_grad():
        for router in mole_routers(model):
            router.router.bias[1] += 2

    def excess_LX():
        model(ids)
        assert routing_loss(model) == (0, {})
        return routing_context(model).stack("picks_TX").mean(1) - target_X

    balance, seen = BiasBalance(model), []
    for _ in range(80):
        seen.append(excess_LX())
        balance.count()
        balance.move()
    assert seen[0].abs().max() > 0.4
    assert torch.stack(seen[-40:]).mean(0).abs().max() < 0.08  # moved by fixed steps, it swings about its target


def test_bias_balance_counts_a_steps_micro_batches_without_padding_and_begins_anew_after_moving():
    model = tiny_mole(balance="bias")
    balance = BiasBalance(model)
    mask = torch.ones_like(INPUT_IDS)
    mask[0, :3] = 0
    for _ in range(2):
        model(INPUT_IDS, attention_mask=mask)
        balance.count()
    assert balance.counts.window.counts_LPX.sum((1, 2)).tolist() == [2 * 18] * 2
    balance.move()
    assert balance.counts.window.counts_LPX is None
    rate = model.peft_config["default"].bias_update_rate
    for router in mole_routers(model):
        assert router.selection_bias.any()
        torch.testing.assert_close(router.selection_bias, rate * router.selection_bias.sign())


def test_bias_balance_leaves_other_models_alone():
    model = tiny_mole()
    balance = BiasBalance(model)
    model(INPUT_IDS)
    balance.count()
    balance.move()
    assert routing_context(model).bias_counts is None
    assert all(router.selection_bias is None for router in mole_routers(model))


def test_the_balance_weight_goes_from_its_first_to_its_final_value():
    model = tiny_mole(balance_loss_weight=0.4, balance_final_weight=0.1, balance_schedule="linear")
    model(INPUT_IDS)
    for progress, weight in {0.0: 0.4, 0.5: 0.25, 1.0: 0.1}.items():
        total, parts = routing_loss(model, progress=progress)
        torch.testing.assert_close(total.detach(), weight * parts["balance_loss"])


def test_two_micro_batches_in_one_window_end_with_the_picks_of_both():
    window, model = BalanceWindow(), tiny_mole()
    for ids in (INPUT_IDS[:1], INPUT_IDS[1:]):
        model(ids)
        routing_loss(model, window=window)
    model(INPUT_IDS)
    whole_LX = routing_context(model).stack("picks_TX").sum(1)
    assert torch.equal(window.counts_LPX.sum(1), whole_LX)


def test_jitter_and_random_dropping_are_drawn_again_the_same_under_checkpointing():
    def grads(checkpoint):
        model = tiny_mole(router_jitter=0.3, drop_share=0.3, top_k=2, lora_dropout=0.2)
        if checkpoint:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(5)
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for plain, checkpointed in zip(grads(False), grads(True), strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


def test_jitter_leaves_evaluation_as_it_is():
    model = tiny_mole(router_jitter=0.5).eval()
    assert torch.equal(model(INPUT_IDS).logits, tiny_mole().eval()(INPUT_IDS).logits)
