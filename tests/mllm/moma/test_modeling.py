"""The whole model: what it equals, what it lets a token see, and that it is used like any transformers model."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaPreTrainedModel

from mllm.common.errors import UserError
from mllm.moma import MomaForCausalLM
from mllm.moma.context import MomaContext
from mllm.moma.expert_choice import ChoiceRouter
from mllm.moma.modeling import DenseFFN, ExpertFFN, MomaExperts
from mllm.routing import BalanceWindow, RoutingStats
from tests.mllm.moma.helpers import (
    CODES,
    IDS,
    MASK,
    TOKEN_CHOICE,
    VOCAB,
    scores,
    tiny_config,
    tiny_moma,
    with_auxiliary,
)

BRIDGE = {  # null experts as in 2601.15370
    "routing": "token_choice",
    "num_experts_per_tok": 2,
    "num_null_experts": 2,
    "real_share": 0.5,
    "shared_expert_intermediate_size": 8,
}
CAUSAL = {
    "threshold": lambda: tiny_moma(),
    "aux": lambda: with_auxiliary(tiny_moma()),
    "threshold, shared": lambda: tiny_moma("2t1i1s", norm_position="expert"),
    "threshold, depths": lambda: tiny_moma(mixture_of_depths=0.5),
    "aux, depths": lambda: with_auxiliary(tiny_moma("4x", mixture_of_depths=0.5)),
    "token choice": lambda: tiny_moma("3t2i", **TOKEN_CHOICE),
    "token choice, nulls": lambda: tiny_moma("4x", **BRIDGE),
    "1t1i": lambda: tiny_moma("1t1i"),
    "places": lambda: tiny_moma(image_side=2, begin_image_token_id=int(IDS[0, 1])),
}
every_causal_model = pytest.mark.parametrize("name", CAUSAL)


def clear_of_ties(logits_BSV):
    """The best token of each step, where no other comes near."""
    best_BS2 = logits_BSV.topk(2).values
    assert (best_BS2[..., 0] - best_BS2[..., 1]).min() > 1e-3
    return logits_BSV.argmax(-1)


# -- what it equals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_position", ["post", "expert", "pre"])
def test_one_expert_with_the_gate_fixed_to_one_equals_the_dense_ffn(norm_position):
    config = tiny_config("dense", norm_position=norm_position)
    context = MomaContext(config.image_token_start, CODES)
    context.begin(input_ids=IDS)
    dense, experts = DenseFFN(config), ExpertFFN(config, context, "ffn")
    experts.router = ChoiceRouter(config.hidden_size, config.layout)  # a lone expert takes all tokens, with weight one
    torch.nn.init.normal_(experts.router.weight)
    with torch.no_grad():
        experts.experts.gate_up_proj[0] = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
        experts.experts.down_proj[0] = dense.down_proj.weight
    hidden, norm = torch.randn(*IDS.shape, config.hidden_size), torch.tanh if norm_position == "expert" else None
    torch.testing.assert_close(experts(hidden, norm=norm), dense(hidden, norm=norm))


def test_1t1i_with_twice_the_same_expert_equals_the_dense_model():
    dense, split = tiny_moma("dense"), tiny_moma("1t1i")
    state = {name: tensor for name, tensor in dense.state_dict().items() if ".ffn." not in name}
    for layer in range(dense.config.num_hidden_layers):
        ffn, prefix = dense.model.layers[layer].ffn, f"model.layers.{layer}.ffn.experts"
        gate_up = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight])
        state |= {f"{prefix}.gate_up_proj": torch.stack([gate_up] * 2)}
        state |= {f"{prefix}.down_proj": torch.stack([ffn.down_proj.weight] * 2)}
    split.load_state_dict(state)
    torch.testing.assert_close(scores(split, IDS), scores(dense, IDS))


def slow_ffn(ffn: ExpertFFN, hidden_TD):
    """The definition, one pick at a time, by the routing that the layer left behind."""
    routing = ffn.routing_context.routings[ffn.name]
    output_TD = torch.zeros_like(hidden_TD)
    for t in range(len(hidden_TD)):
        for k in range(routing.expert_ids_TK.shape[1]):
            if routing.is_real_TK[t, k]:
                e = routing.expert_ids_TK[t, k]
                gate_I, up_I = (ffn.experts.gate_up_proj[e] @ hidden_TD[t]).chunk(2)
                expert_D = ffn.experts.down_proj[e] @ (F.silu(gate_I) * up_I)
                output_TD[t] += routing.expert_weights_TK[t, k] * expert_D
    return output_TD


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_under_autocast_experts_compute_in_its_type_as_a_dense_ffn_does(experts):
    config = tiny_config("1t1i")
    config._experts_implementation = experts
    module = MomaExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    rows, expert = torch.randn(6, config.hidden_size), torch.tensor([0, 0, 0, 1, 1, 1])[:, None]
    rounded = rows.bfloat16().float()
    assert not torch.equal(module(rows, expert, torch.ones(6, 1)), module(rounded, expert, torch.ones(6, 1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(rows, expert, torch.ones(6, 1)), module(rounded, expert, torch.ones(6, 1)))


def test_sizes_that_two_byte_products_do_not_take_are_computed_under_autocast_too():
    config = tiny_config("1t1i", intermediate_size=20)
    config._experts_implementation = "grouped_mm"
    context = MomaContext(config.image_token_start, CODES)
    context.begin(input_ids=IDS)
    ffn, hidden = ExpertFFN(config, context, "ffn"), torch.randn(*IDS.shape, config.hidden_size)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            ffn(hidden), slow_ffn(ffn, hidden.flatten(0, 1)).view_as(hidden), rtol=0.05, atol=0.5
        )


@pytest.mark.parametrize("fields", [{}, {"routing": "token_choice", "num_experts_per_tok": 2}])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_every_expert_function_equals_the_definition_with_all_gradients(experts, fields):
    config = tiny_config("3t2i", **fields)
    config._experts_implementation = experts
    context = MomaContext(config.image_token_start, CODES)
    context.begin(mode="batch", input_ids=IDS, attention_mask=MASK)
    ffn = ExpertFFN(config, context, "ffn")
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(*IDS.shape, config.hidden_size, requires_grad=True)
    inputs = [hidden, *ffn.parameters()]
    fast = ffn(hidden)
    slow = slow_ffn(ffn, hidden.flatten(0, 1)).view_as(fast)
    torch.testing.assert_close(fast, slow)
    for got, expected in zip(
        torch.autograd.grad(fast.square().sum(), inputs, retain_graph=True),
        torch.autograd.grad(slow.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# -- what a token may see ----------------------------------------------------------------------------------------------


def changes(model):
    """Largest change of the first logits of each row when later tokens are others, and of row 0 when other rows are."""
    later, others = IDS.clone(), IDS.clone()
    later[:, 5:] = (later[:, 5:] + 11) % (VOCAB - 1) + 1
    others[1:] = others[1:].flip(0, 1)
    before = scores(model, IDS)
    by_later = (scores(model, later) - before)[:, :5].abs().max()
    by_others = (scores(model, others) - before)[0].abs().max()
    return by_later, by_others


@every_causal_model
def test_in_causal_modes_neither_later_tokens_nor_other_rows_change_a_tokens_logits(name):
    assert max(changes(CAUSAL[name]())) < 1e-5


@pytest.mark.parametrize("fields", [{}, {"mixture_of_depths": 0.5}])
def test_the_leaky_batch_mode_is_caught_by_the_same_detector_and_is_called_leaky(fields):
    model = tiny_moma(**fields)
    model.set_evaluation_routing("batch_leaky")
    assert min(changes(model)) > 1e-3
    assert model.routing_mode == model.routing_context.mode == "batch_leaky"


def test_training_chooses_over_the_batch_and_evaluation_does_not():
    model = tiny_moma()
    assert model.train().routing_mode == "batch"
    assert model.eval().routing_mode == "threshold"
    assert with_auxiliary(model).eval().routing_mode == "aux"
    assert tiny_moma("1t1i").train().routing_mode == "token"


def test_generating_by_the_batch_is_refused():
    model = tiny_moma()
    with pytest.raises(UserError, match="not there yet"):
        model.train().generate(IDS, max_new_tokens=1)
    model.eval().set_evaluation_routing("batch_leaky")
    with pytest.raises(UserError, match="not there yet"):
        model.generate(IDS, max_new_tokens=1)
    cache = tiny_moma()(IDS, use_cache=True).past_key_values
    with pytest.raises(UserError, match="cache's next step"):
        model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("preset", "mode", "match"),
    [
        ("2t2i", "batch", "one of batch_leaky, threshold, aux"),
        ("2t2i", "aux", "no auxiliary routers"),
        ("1t1i", "threshold", "for expert choice"),
    ],
)
def test_an_evaluation_mode_that_the_model_cannot_have_is_refused(preset, mode, match):
    with pytest.raises(UserError, match=match):
        tiny_moma(preset).set_evaluation_routing(mode)


# -- generation --------------------------------------------------------------------------------------------------------


@every_causal_model
def test_cached_generation_equals_full_recomputation(name):
    model = CAUSAL[name]()
    cached = model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = IDS
    for _ in range(6):
        ids = torch.cat([ids, clear_of_ties(scores(model, ids, use_cache=False)[:, -1:])], dim=1)
    assert torch.equal(cached, ids)


@every_causal_model
def test_rows_padded_on_the_left_are_continued_as_they_are_alone(name):
    model = CAUSAL[name]()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    batched = model.generate(IDS.where(MASK == 1, 0), attention_mask=MASK, **options)[:, IDS.shape[1] :]
    for row, mask, continued in zip(IDS, MASK, batched, strict=True):
        alone = row[mask == 1][None]
        assert torch.equal(model.generate(alone, **options)[0, alone.shape[1] :], continued)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"norm_position": "expert"}, {"norm_position": "pre"}])
@pytest.mark.parametrize("preset", ["2t2i", "2t1i1s", "4x"])
def test_gradients_reach_every_expert_and_every_router(preset, fields):
    model = tiny_moma(preset, **fields).train()
    model(IDS, labels=IDS).loss.backward()
    for layer in model.model.layers:
        for parameter in (*layer.ffn.experts.parameters(), layer.ffn.router.weight):
            assert parameter.grad.flatten(1).abs().sum(1).min() > 0


@pytest.mark.parametrize("rows", ["text", "image"])
def test_a_batch_of_one_modality_trains_and_leaves_the_others_experts_without_gradient(rows):
    model = tiny_moma("2t2i").train()
    ids = IDS % 20 + 1 if rows == "text" else IDS % CODES + VOCAB - CODES
    model(ids, labels=ids).loss.backward()
    reached = model.model.layers[1].ffn.experts.down_proj.grad.flatten(1).any(1)
    assert reached.tolist() == ([True, True, False, False] if rows == "text" else [False, False, True, True])


@pytest.mark.parametrize(("norm_position", "reaches"), [("post", False), ("expert", True), ("pre", True)])
def test_behind_a_post_norm_the_gate_of_a_token_with_one_expert_gets_no_gradient(norm_position, reaches):
    model = tiny_moma("2x", norm_position=norm_position).train()
    with torch.no_grad():
        for layer in model.model.layers:  # opposite scores: half of the tokens each, none twice
            layer.ffn.router.weight[1] = -layer.ffn.router.weight[0]
    model(IDS, labels=IDS).loss.backward()
    assert (model.routing_context.stack("is_taken_TK").sum(2) == 1).all()
    gradient = model.model.layers[-1].ffn.router.weight.grad.abs().max()
    assert bool(gradient > 1e-4) == reaches


@pytest.mark.parametrize(
    ("fields", "auxiliary"),
    [
        ({}, False),
        ({"mixture_of_depths": 0.5, "router_noise": 1.0}, False),
        (BRIDGE, False),
        ({"mixture_of_depths": 0.5}, True),
    ],
)
def test_checkpointing_changes_neither_loss_nor_gradients_nor_thresholds(fields, auxiliary):
    plain = tiny_moma("4x", **fields).train()
    checkpointed = tiny_moma("4x", **fields).train()
    if auxiliary:
        for model in (plain, checkpointed):
            torch.manual_seed(2)
            model.begin_auxiliary_stage()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        losses.append(model(IDS, attention_mask=MASK, labels=IDS).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    for (name, buffer), other in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(buffer, other), name


@pytest.mark.parametrize("fields", [{}, {"mixture_of_depths": 0.5}, TOKEN_CHOICE, BRIDGE])
def test_twenty_steps_lower_the_loss(fields):
    model = tiny_moma("4x", initializer_range=0.05, **fields).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_balance_loss_of_token_choice_is_in_the_training_loss_alone():
    model = tiny_moma("3t2i", balance_loss_weight=0.5, z_loss_weight=0.1, **TOKEN_CHOICE)
    evaluated = model(IDS, labels=IDS).loss
    trained = model.train()(IDS, labels=IDS).loss
    torch.testing.assert_close(trained - evaluated, model.routing_loss())
    assert model.routing_loss() > 0.4


def test_balance_is_counted_over_the_micro_batches_of_a_step():
    model = tiny_moma("3t2i", balance_loss_weight=0.5, **TOKEN_CHOICE).train()
    alone = [model(half, labels=half).loss for half in (IDS[:1], IDS[1:])]
    window = model.balance_window = BalanceWindow()
    together = [model(half, labels=half).loss for half in (IDS[:1], IDS[1:])]
    torch.testing.assert_close(together[0], alone[0])
    assert abs(together[1] - alone[1]) > 1e-5
    assert window.counts_LPX.sum() == IDS.numel() * model.config.num_hidden_layers
    window.reset()
    torch.testing.assert_close(model(IDS[1:], labels=IDS[1:]).loss, alone[1])


def test_a_micro_batchs_routing_loss_weighs_as_much_as_its_labels():
    model = tiny_moma("3t2i", balance_loss_weight=0.5, **TOKEN_CHOICE).train()
    whole = model(IDS, labels=IDS).loss
    num_labels = IDS[:, 1:].numel()
    torch.testing.assert_close(model(IDS, labels=IDS, num_items_in_batch=2 * num_labels).loss, whole / 2)


def test_the_auxiliary_stage_trains_auxiliary_routers_alone_and_generation_goes_by_them():
    model = tiny_moma(mixture_of_depths=0.5)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    model.begin_auxiliary_stage()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(15):
        loss = model.train()(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < 1
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.eval().routing_mode == "aux"
    assert model.generate(IDS, max_new_tokens=2, eos_token_id=None).shape == (3, 12)


def test_a_model_that_chooses_nothing_over_a_batch_has_no_auxiliary_stage():
    with pytest.raises(UserError, match="makes none"):
        tiny_moma("4x", **TOKEN_CHOICE).begin_auxiliary_stage()


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"mixture_of_depths": 0.5}, TOKEN_CHOICE, BRIDGE])
@pytest.mark.parametrize("training", [True, False])
def test_padding_meets_no_expert(training, fields):
    model = tiny_moma("4x", **fields).train(training)
    scores(model, IDS, attention_mask=MASK)
    taken_LTK = model.routing_context.stack("is_real_TK")
    assert taken_LTK.any()
    assert not taken_LTK[:, MASK.flatten() == 0].any()


def test_a_tokens_modality_is_read_from_its_id_and_markers_are_text():
    model = tiny_moma("2t2i", image_token_start=20, begin_image_token_id=19, end_image_token_id=36)
    scores(model, torch.tensor([[5, 19, 20, 35, 36, 7]]))
    assert model.routing_context.is_image_T.tolist() == [False, False, True, True, False, False]


def test_embeddings_are_enough_for_a_mixed_model_but_not_for_a_split_one():
    embeds = torch.randn(1, 4, 16)
    assert tiny_moma("4x")(inputs_embeds=embeds).logits.shape == (1, 4, VOCAB)
    with pytest.raises(UserError, match="call it with input_ids"):
        tiny_moma("2t2i")(inputs_embeds=embeds)


def test_routing_statistics_read_it_like_any_model_of_ours():
    model, stats = tiny_moma("2t2i"), RoutingStats()
    model.train()(IDS)
    stats.update(model.routing_context)
    figures = stats.summary()
    assert figures["routing/load"] == 1  # capacities sum to the tokens
    assert figures["routing/mi_modality_ratio"] == pytest.approx(1)  # the expert tells the modality
    assert stats.layers == ["layers.0.ffn", "layers.1.ffn", "layers.2.ffn"]


def test_where_all_picks_are_null_the_shared_expert_is_left():
    model = tiny_moma("4x", **BRIDGE)
    ffn, hidden = model.model.layers[0].ffn, torch.randn(*IDS.shape, 16)
    with torch.no_grad():
        ffn.router.router.bias.copy_(torch.tensor([0.0, 0, 0, 0, 100]))
        model.routing_context.begin(input_ids=IDS)
        assert torch.equal(ffn(hidden), ffn.shared_expert(hidden))


# -- transformers ------------------------------------------------------------------------------------------------------


@every_causal_model
def test_a_saved_model_is_loaded_by_its_type_with_thresholds_and_auxiliary_routers(name, tmp_path):
    model = CAUSAL[name]()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MomaForCausalLM
    assert loaded.routing_mode == model.routing_mode
    for weight in loaded.parameters():  # mapped from the file it starts anywhere, and some kernels then sum otherwise
        weight.data = weight.data.clone()
    assert torch.equal(scores(loaded, IDS), scores(model, IDS))


def test_loaded_in_bfloat16_routers_and_thresholds_keep_fp32_and_it_generates(tmp_path):
    with_auxiliary(tiny_moma(mixture_of_depths=0.5)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if "router" in name else torch.bfloat16), name
    assert loaded.generate(IDS, max_new_tokens=2, eos_token_id=None).shape == (3, 12)


def test_auxiliary_routers_that_were_loaded_learn_only_in_their_stage(tmp_path):
    with_auxiliary(tiny_moma()).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "auxiliary" in name)
    loaded.begin_auxiliary_stage()
    assert all(p.requires_grad == ("auxiliary" in name) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("fields", [{}, TOKEN_CHOICE])
def test_transformers_trainer_trains_it_as_it_is(fields, tmp_path):
    model = tiny_moma("3t2i", **fields)
    before = model.model.layers[0].ffn.experts.down_proj.detach().clone()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to="none",
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    assert Trainer(model, arguments, train_dataset=rows).train().training_loss < 100
    assert not torch.equal(model.model.layers[0].ffn.experts.down_proj, before)


def test_the_expert_function_is_the_one_that_was_asked_for():
    LlamaForCausalLM._can_set_experts_implementation()  # what Llama's answer is must not matter
    LlamaPreTrainedModel._can_set_experts_implementation()
    model = tiny_moma()
    assert model.config._experts_implementation == "grouped_mm"
    before = scores(model, IDS)
    model.set_experts_implementation("eager")
    assert isinstance(model.model.layers[0].ffn.experts, MomaExperts)
    assert model.model.layers[0].ffn.experts.config._experts_implementation == "eager"
    torch.testing.assert_close(scores(model, IDS), before)


def test_importing_the_model_does_not_import_deepspeed():
    code = "import sys, mllm.moma; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("fields", [{}, {"mixture_of_depths": 0.5}, TOKEN_CHOICE])
def test_two_forwards_before_backward_are_recomputed_with_their_own_tokens(fields):
    gradients = []
    for checkpointed in (False, True):
        model = tiny_moma("3t2i", **fields).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [model(ids, labels=ids).loss for ids in (IDS, IDS.flip(0)[:, 2:])]
        with torch.no_grad():
            model.eval()(IDS[:1, :3])
        model.train()
        sum(losses).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
