"""Null experts on transformers' own MoE models, each family as a random model of a few thousand weights."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mllm import native_moe
from mllm.build import build
from mllm.common.errors import UserError
from mllm.routing import BalanceWindow, RoutingStats
from tests.tiny import tiny_image, tiny_tokenizer, tiny_tower

E, K, D, VOCAB = 4, 2, 16, 50
INPUT_IDS = torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "pad_token_id": 0,
}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = COMMON | MLA | {"n_routed_experts": E, "moe_intermediate_size": 24, "routed_scaling_factor": 1.5}
GROUPS = {"n_group": 2, "topk_group": 1}
CONFIGS = {
    "mixtral": MixtralConfig(**COMMON, num_local_experts=E),
    "olmoe": OlmoeConfig(**COMMON, num_experts=E),
    "qwen2": Qwen2MoeConfig(**COMMON, num_experts=E, moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "qwen3": Qwen3MoeConfig(**COMMON, num_experts=E, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True),
    "deepseek_v2": DeepseekV2Config(**DEEPSEEK, topk_method="greedy"),
    "deepseek_v2_groups": DeepseekV2Config(**DEEPSEEK, **GROUPS, topk_method="group_limited_greedy"),
    "deepseek_v3": DeepseekV3Config(**DEEPSEEK, n_group=1, topk_group=1, first_k_dense_replace=0),
    "deepseek_v3_groups": DeepseekV3Config(**DEEPSEEK, **GROUPS, first_k_dense_replace=1),
}
NORMALIZED = ("mixtral", "qwen3", "deepseek_v3", "deepseek_v3_groups")
EXPERTS = ("eager", "batched_mm", "grouped_mm")

every_family = pytest.mark.parametrize("family", CONFIGS)


def tiny_moe(family: str = "olmoe", experts: str = "eager", dtype=torch.float32, **overrides) -> PreTrainedModel:
    """A model whose routers, of random rows ten times the usual size, prefer some experts clearly."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    for name, value in overrides.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts, dtype=dtype).eval()
    for module in model.modules():
        if type(module).__name__ in native_moe.FAMILIES:
            module.weight.data.normal_(std=0.5)
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.normal_(std=0.1)
    return model


def with_nulls(family: str = "olmoe", experts: str = "eager", **options) -> PreTrainedModel:
    model = tiny_moe(family, experts)
    native_moe.add_null_experts(model, **({"num_null_experts": 4, "top_k": 3, "init": "random"} | options))
    for router in routers(model):
        if router.null_weight is not None:
            router.null_weight.data.normal_(std=0.5)
    return model


def routers(model) -> list[native_moe.NullRouter]:
    return [module for module in model.modules() if isinstance(module, native_moe.NullRouter)]


def make_all_null(model) -> None:
    """Nulls win every pick: real logits are pushed far below by a router that scores any input so."""
    for router in routers(model):
        router.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]),))
        router.weight.data.fill_(-2.0)
        router.null_weight.data.fill_(2.0)


def routed_layers(model) -> list[torch.nn.Module]:
    return [model.get_decoder().get_submodule(layer) for layer in native_moe._routers(model)]


def nothing_is_added(block, hidden: torch.Tensor) -> torch.Tensor:
    """What the block gives beside its routed experts."""
    if hasattr(block, "shared_experts"):
        return block.shared_experts(hidden)
    if hasattr(block, "shared_expert"):
        return torch.sigmoid(block.shared_expert_gate(hidden)) * block.shared_expert(hidden)
    return torch.zeros_like(hidden)


# -- what stays as it was ----------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_null_experts_a_family_stays_bit_equal(family, experts, dtype):
    model = tiny_moe(family, experts, dtype)
    expected = model(INPUT_IDS).logits
    native_moe.add_null_experts(model, num_null_experts=0)
    assert torch.equal(model(INPUT_IDS).logits, expected)


@every_family
def test_without_null_experts_a_family_stays_bit_equal_under_autocast(family):
    model = tiny_moe(family, "grouped_mm")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(INPUT_IDS).logits
        native_moe.add_null_experts(model, num_null_experts=0)
        assert torch.equal(model(INPUT_IDS).logits, expected)


@every_family
def test_without_null_experts_gradients_stay_bit_equal(family):
    model = tiny_moe(family)
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    native_moe.add_null_experts(model, num_null_experts=0)
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())


@every_family
def test_top_k_alone_can_be_raised(family):
    top_k = K if "groups" in family else K + 1
    raised, configured = tiny_moe(family), tiny_moe(family, num_experts_per_tok=top_k)
    native_moe.add_null_experts(raised, num_null_experts=0, top_k=top_k)
    assert torch.equal(raised(INPUT_IDS).logits, configured(INPUT_IDS).logits)


@every_family
@pytest.mark.parametrize("experts", EXPERTS)
def test_experts_skip_null_picks_as_the_definition_says(family, experts):
    model = with_nulls(family, experts)
    block = routed_layers(model)[-1]
    hidden = torch.randn(1, 9, D)
    context = native_moe.routing_context(model)
    context.begin(inputs_embeds=hidden)
    output = block(hidden)
    (routing,) = context.routings.values()
    assert 0 < routing.is_real_TK.sum() < routing.is_real_TK.numel()
    rows = []
    for x_D, ids_K, weights_K in zip(hidden[0], routing.expert_ids_TK, routing.expert_weights_TK, strict=True):
        y_D = torch.zeros(D)
        for expert, weight in zip(ids_K.tolist(), weights_K, strict=True):
            if expert < E:
                gate, up = (block.experts.gate_up_proj[expert] @ x_D).chunk(2)
                y_D = y_D + weight * (block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(y_D)
    torch.testing.assert_close(output, torch.stack(rows)[None] + nothing_is_added(block, hidden))


@every_family
@pytest.mark.parametrize("experts", EXPERTS)
def test_a_block_whose_picks_are_all_null_adds_its_shared_experts_only(family, experts):
    model = with_nulls(family, experts)
    make_all_null(model)
    hidden = torch.randn(2, 5, D)
    for block in routed_layers(model):
        assert torch.equal(block(hidden), nothing_is_added(block, hidden))


# -- weights -----------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("renormalize", [None, True, False])
def test_weights_of_real_picks_sum_to_one_where_they_are_renormalised(family, renormalize):
    model = with_nulls(family, renormalize=renormalize)
    model(INPUT_IDS)
    scaling = getattr(model.config, "routed_scaling_factor", 1.0)
    for routing in native_moe.routing_context(model).routings.values():
        assert torch.all(routing.expert_weights_TK[~routing.is_real_TK] == 0)
        sums_T = routing.expert_weights_TK.sum(1)[routing.is_real_TK.any(1)] / scaling
        if renormalize or (renormalize is None and family in NORMALIZED):
            torch.testing.assert_close(sums_T, torch.ones_like(sums_T))
        else:
            assert torch.all((sums_T - 1).abs() > 1e-4)


def test_renormalised_weights_are_probabilities_over_their_sum_on_real_picks():
    model = with_nulls("olmoe", renormalize=True)
    model(INPUT_IDS)
    for routing in native_moe.routing_context(model).routings.values():
        probs_TK = routing.router_logits_TX.softmax(-1).gather(1, routing.expert_ids_TK) * routing.is_real_TK
        expected_TK = probs_TK / probs_TK.sum(1, keepdim=True).clamp(min=1e-9)
        torch.testing.assert_close(routing.expert_weights_TK, expected_TK)


@pytest.mark.parametrize("experts", EXPERTS)
def test_identity_nulls_add_their_weight_times_the_input(experts):
    zero, identity = (with_nulls("olmoe", experts, null_kind=kind, renormalize=False) for kind in ("zero", "identity"))
    hidden = torch.randn(1, 9, D)
    context = native_moe.routing_context(identity)
    context.begin(inputs_embeds=hidden)
    added = routed_layers(identity)[0](hidden) - routed_layers(zero)[0](hidden)
    (routing,) = context.routings.values()
    null_weight_T1 = (routing.expert_weights_TK * ~routing.is_real_TK).sum(1, keepdim=True)
    assert null_weight_T1.max() > 0.1
    torch.testing.assert_close(added[0], null_weight_T1 * hidden[0])


def test_identity_nulls_share_in_the_renormalised_sum():
    model = with_nulls("mixtral", null_kind="identity")
    model(INPUT_IDS)
    for routing in native_moe.routing_context(model).routings.values():
        torch.testing.assert_close(routing.expert_weights_TK.sum(1), torch.ones(INPUT_IDS.numel()))


def test_identity_nulls_alone_return_the_input():
    model = with_nulls("mixtral", null_kind="identity")
    make_all_null(model)
    hidden = torch.randn(2, 5, D)
    torch.testing.assert_close(routed_layers(model)[0](hidden), hidden)


# -- work --------------------------------------------------------------------------------------------------------------


def flops(block, hidden) -> int:
    with FlopCounterMode(display=False) as counter:
        block(hidden)
    return counter.get_total_flops()


def test_eager_experts_spend_products_on_real_picks_only():
    model = with_nulls("mixtral", "eager")
    block, hidden = routed_layers(model)[0], torch.randn(1, 33, D)
    context = native_moe.routing_context(model)
    context.begin(inputs_embeds=hidden)
    spent = flops(block, hidden)
    real_picks = int(context.routings["layers.0.mlp"].is_real_TK.sum())
    router = 2 * 33 * D * (E + 4)
    assert 0 < real_picks < 33 * 3
    assert spent == router + real_picks * 2 * 3 * D * 24


def test_grouped_products_get_rows_of_real_picks_only(monkeypatch):
    rows = []
    product = torch.nn.functional.grouped_mm

    def counting(input, weight, *, offs):
        rows.append(int(offs[-1]))
        return product(input, weight, offs=offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counting)
    model = with_nulls("mixtral", "grouped_mm")
    model(INPUT_IDS)
    real = [int(routing.is_real_TK.sum()) for routing in native_moe.routing_context(model).routings.values()]
    assert 0 < min(real) <= max(real) < INPUT_IDS.numel() * 3
    assert rows == [picks for picks in real for _ in ("gate and up", "down")]


def test_random_dropping_leaves_the_asked_share_of_picks_out():
    torch.manual_seed(0)
    model = tiny_moe("mixtral")
    context = native_moe.add_null_experts(model, num_null_experts=0, drop_share=0.3)
    model(INPUT_IDS.repeat(40, 1))
    assert context.stack("is_real_TK").float().mean().item() == pytest.approx(0.7, abs=0.03)


# -- null rows ---------------------------------------------------------------------------------------------------------


def test_tiled_nulls_start_as_copies_of_the_real_experts():
    model = tiny_moe()
    native_moe.add_null_experts(model, num_null_experts=6, top_k=4)
    for router in routers(model):
        assert torch.equal(router.null_weight, router.weight[[0, 1, 2, 3, 0, 1]])


def test_shared_nulls_have_one_row_and_one_logit():
    model = with_nulls(null_logits="shared")
    model(INPUT_IDS)
    assert all(router.null_weight.shape == (1, D) for router in routers(model))
    for routing in native_moe.routing_context(model).routings.values():
        assert routing.router_logits_TX.shape == (INPUT_IDS.numel(), E + 4)
        assert torch.all(routing.router_logits_TX[:, E:] == routing.router_logits_TX[:, E : E + 1])


@every_family
@pytest.mark.parametrize("experts", EXPERTS)
def test_the_task_loss_reaches_real_and_null_rows_with_finite_gradients(family, experts):
    model = with_nulls(family, experts, renormalize=False)
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(router.weight.grad.any() for router in routers(model))
    if family.startswith("deepseek_v3"):
        return  # scores are sigmoids: a null's logit enters nobody's weight
    assert all(router.null_weight.grad.any() for router in routers(model))


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_renormalised_over_real_picks_null_rows_learn_from_the_balance_loss_alone(family):
    model = with_nulls(family)
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(router.weight.grad.abs().max() > 1e-5 for router in routers(model))
    assert all(router.null_weight.grad.abs().max() < 1e-8 for router in routers(model))
    model(INPUT_IDS)
    native_moe.balance_loss(model).backward()
    assert all(router.null_weight.grad.abs().max() > 1e-5 for router in routers(model))


def test_all_null_tokens_have_finite_gradients():
    model = with_nulls("mixtral", "grouped_mm")
    make_all_null(model)
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# -- balance loss ------------------------------------------------------------------------------------------------------


def test_the_balance_loss_is_adamoes_equation_over_top_k():
    model = with_nulls("mixtral")
    model(INPUT_IDS)
    layers = []
    for routing in native_moe.routing_context(model).routings.values():
        f_X = routing.picks_TX.mean(0)
        f_X[E:] = f_X[E:].mean()
        layers.append((E + 4) * (f_X * routing.router_probs_TX.mean(0)).sum())
    torch.testing.assert_close(native_moe.balance_loss(model), torch.stack(layers).mean() / 3)


def test_averaging_the_nulls_differs_from_balancing_each():
    model = with_nulls("mixtral")
    model(INPUT_IDS)
    averaged, each = (native_moe.balance_loss(model, null_balance=kind) for kind in ("averaged", "each"))
    assert (averaged - each).abs() > 1e-3


def test_the_averaged_loss_pushes_all_nulls_alike():
    model = with_nulls("mixtral")
    context = native_moe.routing_context(model)
    pushes = {}
    for kind in ("averaged", "each"):
        model(INPUT_IDS)
        probs = [routing.router_probs_TX for routing in context.routings.values()]
        gradients = torch.autograd.grad(native_moe.balance_loss(model, null_balance=kind), probs)
        pushes[kind] = torch.stack(gradients)[:, 0, E:]
    assert torch.all(pushes["averaged"] == pushes["averaged"][:, :1])
    assert not torch.all(pushes["each"] == pushes["each"][:, :1])


def test_training_on_the_balance_loss_reaches_the_asked_share_of_real_picks():
    model = with_nulls("mixtral", null_logits="shared")
    model.requires_grad_(False)
    parameters = native_moe.router_parameters(model)
    for parameter in parameters:
        parameter.requires_grad_(True)
    context = native_moe.routing_context(model)
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for _ in range(60):
        model(INPUT_IDS)
        native_moe.balance_loss(model, real_share=0.25).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert context.stack("is_real_TK").float().mean().item() == pytest.approx(0.25, abs=0.1)


def test_a_base_that_renormalises_one_pick_itself_stays_what_it_was(tmp_path):
    model = tiny_moe("mixtral", num_experts_per_tok=1)
    expected = model(INPUT_IDS).logits
    native_moe.add_null_experts(model, num_null_experts=0)
    assert torch.equal(model(INPUT_IDS).logits, expected)
    native_moe.save_null_experts(model, tmp_path)
    native_moe.load_null_experts(tiny_moe("mixtral", num_experts_per_tok=1), tmp_path)


def test_a_window_pools_the_picks_of_a_steps_micro_batches():
    model, window = with_nulls(), BalanceWindow()
    for ids in (INPUT_IDS[:1], INPUT_IDS[1:]):
        model(ids)
        last = native_moe.balance_loss(model, window=window)
    alone = native_moe.balance_loss(model)
    model(INPUT_IDS)
    whole_LX = native_moe.routing_context(model).stack("picks_TX").sum(1)
    assert torch.equal(window.counts_LPX.sum(1), whole_LX)
    assert not torch.equal(last, alone)


def test_a_window_is_refused_where_nothing_is_pooled_over_a_step():
    model = with_nulls()
    model(INPUT_IDS)
    with pytest.raises(UserError, match='window is for balance="global_batch"'):
        native_moe.balance_loss(model, balance="layer", window=BalanceWindow())


def test_padding_does_not_count_in_the_balance_loss():
    model = with_nulls("mixtral").eval()
    model(INPUT_IDS)
    alone = native_moe.balance_loss(model)
    padded = torch.cat([INPUT_IDS, torch.zeros(3, 4, dtype=torch.long)], dim=1)
    model(padded, attention_mask=(torch.arange(11) < 7).long().expand(3, -1))
    torch.testing.assert_close(native_moe.balance_loss(model), alone)


# -- around it ---------------------------------------------------------------------------------------------------------


def test_statistics_count_native_routers_as_they_count_adapters():
    model = with_nulls("olmoe")
    model(INPUT_IDS)
    context = native_moe.routing_context(model)
    stats = RoutingStats()
    stats.update(context)
    load = context.stack("is_real_TK").float().sum(-1).mean().item()
    assert stats.layers == ["layers.0.mlp", "layers.1.mlp"]
    assert stats.summary()["routing/load"] == pytest.approx(load)


def test_activation_checkpointing_changes_neither_loss_nor_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = with_nulls("olmoe", "grouped_mm").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(INPUT_IDS, labels=INPUT_IDS).loss + native_moe.balance_loss(model)
        loss.backward()
        assert native_moe.routing_context(model).layers == ["layers.0.mlp", "layers.1.mlp"]
        gradients.append([router.null_weight.grad for router in routers(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_copied_model_keeps_its_own_record():
    model = with_nulls("olmoe")
    twin = copy.deepcopy(model)
    twin(INPUT_IDS)
    assert len(native_moe.routing_context(twin).routings) == 2
    assert not native_moe.routing_context(model).routings


def test_a_llava_on_an_moe_generates_and_tells_its_pictures_tokens():
    tokenizer = tiny_tokenizer()
    config = OlmoeConfig(**COMMON | {"vocab_size": len(tokenizer)}, num_experts=E, eos_token_id=1)
    language_model = AutoModelForCausalLM.from_config(config).eval()
    model, processor = build(tiny_tower(), language_model, tokenizer=tokenizer)
    context = native_moe.add_null_experts(model, num_null_experts=4, top_k=3)
    inputs = processor(text="USER: <image> What? ASSISTANT:", images=[tiny_image()], return_tensors="pt")
    model(**inputs)
    assert context.is_image_T.sum() == 9
    assert context.layers == ["layers.0.mlp", "layers.1.mlp"]
    generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 4
    assert context.stack("expert_ids_TK").shape == (2, 1, 3)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_lora_on_the_experts_trains_beside_the_routers(experts, tmp_path):
    model = with_nulls("olmoe", experts)
    lora = LoraConfig(
        r=2,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    peft_model = get_peft_model(model, lora)
    for parameter in native_moe.router_parameters(peft_model):
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss = peft_model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss + native_moe.balance_loss(peft_model)
        loss.backward()
        optimizer.step()
    trained = {name for name, p in peft_model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("experts" in name and "lora_A" in name for name in trained)
    assert any("null_weight" in name for name in trained)
    peft_model.save_pretrained(tmp_path / "lora")
    native_moe.save_null_experts(peft_model, tmp_path / "nulls")
    base = tiny_moe("olmoe", experts)
    native_moe.load_null_experts(base, tmp_path / "nulls")
    again = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert torch.equal(again.eval()(INPUT_IDS).logits, peft_model.eval()(INPUT_IDS).logits)


# -- saving and loading ------------------------------------------------------------------------------------------------


@every_family
def test_saved_null_experts_give_the_same_model_on_the_base_again(family, tmp_path):
    model = with_nulls(family, null_kind="identity", renormalize=True)
    for parameter in native_moe.router_parameters(model):
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    native_moe.save_null_experts(model, tmp_path)
    again = tiny_moe(family)
    native_moe.load_null_experts(again, tmp_path)
    assert torch.equal(again(INPUT_IDS).logits, model(INPUT_IDS).logits)
    assert json.loads((tmp_path / native_moe.CONFIG_FILE).read_text())["config"]["num_null_experts"] == 4


def test_null_experts_are_refused_on_another_base_which_stays_as_it_was(tmp_path):
    native_moe.save_null_experts(with_nulls(), tmp_path)
    other = tiny_moe()
    other.get_decoder().layers[1].mlp.gate.weight.data.add_(0.1)
    expected = other(INPUT_IDS).logits
    with pytest.raises(UserError, match=r"another base: the router of layers\.1\.mlp differs, and 1 of 2"):
        native_moe.load_null_experts(other, tmp_path)
    assert torch.equal(other(INPUT_IDS).logits, expected)


def test_null_experts_fit_a_base_loaded_in_another_precision(tmp_path):
    saved = with_nulls()
    native_moe.save_null_experts(saved, tmp_path)
    loaded = tiny_moe().to(torch.bfloat16)
    native_moe.load_null_experts(loaded, tmp_path)
    expected = saved.to(torch.bfloat16)(INPUT_IDS).logits
    assert torch.equal(loaded(INPUT_IDS).logits, expected)


def test_null_experts_of_a_deeper_base_are_refused(tmp_path):
    native_moe.save_null_experts(with_nulls(), tmp_path)
    with pytest.raises(UserError, match=r"2 routed layers .* this one has 1"):
        native_moe.load_null_experts(tiny_moe(num_hidden_layers=1), tmp_path)


def test_a_folder_without_null_experts_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no null_experts\.json"):
        native_moe.load_null_experts(tiny_moe(), tmp_path)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_model_without_known_routers_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{k: v for k, v in COMMON.items() if "experts" not in k}))
    with pytest.raises(UserError, match=r"LlamaForCausalLM has no router .* found none"):
        native_moe.add_null_experts(model, num_null_experts=1)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2", "qwen3"])
@pytest.mark.parametrize("asked", ["argument", "config"])
def test_router_logits_are_refused_because_transformers_loss_would_be_wrong(family, asked):
    model = with_nulls(family)
    model.config.output_router_logits = asked == "config"
    arguments = {"output_router_logits": True} if asked == "argument" else {}
    with pytest.raises(UserError, match="balance_loss"):
        model(INPUT_IDS, labels=INPUT_IDS, **arguments)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("olmoe", {"top_k": 9}, "top_k=9 must be from 1 to 8"),
        ("olmoe", {"top_k": 0}, "top_k=0"),
        ("deepseek_v2_groups", {"top_k": 7}, "from 1 to 6: a token chooses among 2 real and 4 null"),
        ("olmoe", {"num_null_experts": -1}, "must not be negative"),
        ("olmoe", {"null_logits": "none"}, "null_logits='none' is not known; choose one of own, shared"),
        ("olmoe", {"null_kind": "copy"}, "null_kind='copy' is not known"),
        ("olmoe", {"init": "ones"}, "init='ones' is not known"),
        ("olmoe", {"null_logits": "shared", "init": "tile"}, "shared logits have one row"),
        ("olmoe", {"drop_share": 1.5}, "drop_share is a probability"),
        ("olmoe", {"top_k": 1, "renormalize": True}, "top_k=1 with renormalised weights"),
        ("olmoe", {"top_k": 1, "renormalize": True, "null_kind": "identity"}, "the router would get no gradient"),
        ("mixtral", {"top_k": 1}, "top_k=1 with renormalised weights"),
    ],
)
def test_values_that_cannot_be_are_refused_and_leave_the_model_alone(family, options, reason):
    model = tiny_moe(family)
    with pytest.raises(UserError, match=reason):
        native_moe.add_null_experts(model, **({"num_null_experts": 4} | options))
    assert not routers(model)


def test_null_experts_are_not_added_twice():
    with pytest.raises(UserError, match="has null experts already"):
        native_moe.add_null_experts(with_nulls(), num_null_experts=1)


def test_null_experts_go_below_an_adapter_not_above_it():
    with pytest.raises(UserError, match="to the base first"):
        native_moe.add_null_experts(
            get_peft_model(tiny_moe(), LoraConfig(target_modules=["q_proj"])), num_null_experts=1
        )


def test_expert_parallel_models_are_refused():
    model = tiny_moe()
    model.get_decoder().layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(UserError, match=r"experts of layers\.1\.mlp \(OlmoeExperts\)"):
        native_moe.add_null_experts(model, num_null_experts=1)


def test_a_balance_loss_without_a_recorded_forward_is_refused():
    with pytest.raises(UserError, match="No routing was recorded"):
        native_moe.balance_loss(with_nulls())


def test_a_router_in_modules_to_save_is_not_silently_without_balance():
    model = get_peft_model(with_nulls(), LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp.gate"]))
    model(INPUT_IDS)
    with pytest.raises(UserError, match="modules_to_save"):
        native_moe.balance_loss(model)
