"""The faithful-and-fixed list: what the four papers and their released code do, and what is done better here.

Beside it stand, by their names: two ranks against the joined batch in `tests/mllm/routing/test_two_ranks.py`, balance
by sample against the global batch and by-hand null averaging in `tests/mllm/routing/test_losses.py`.
"""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from mllm.common.errors import UserError
from mllm.mole import MoleConfig, routing_context, routing_loss
from mllm.routing import RoutingStats
from tests.mllm.mole.helpers import INPUT_IDS, gradients, mole_routers, tiny_llama, tiny_mole, wake
from tests.mllm.routing.slow import slow_balance
from tests.tiny import tiny_image, tiny_llava

PATHS = ["masked", "sorted"]
RELEASED = {"gate": "none", "balance": "sample", "num_experts": 3}  # LLaVA-MoLE, 2401.16160, its released code
ADAMOE = {"gate": "softmax", "num_experts": 3, "num_null_experts": 2, "top_k": 3}  # 2406.13233


def router_gradients(model):
    return [p.grad for name, p in model.named_parameters() if "mole_router" in name]


# -- LLaVA-MoLE: the router and the task -------------------------------------------------------------------------------


def test_as_released_the_task_gives_the_router_exactly_no_gradient():
    model = tiny_mole(gate="none", balance="none")
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert routing_loss(model) == (0, {})
    assert len(router_gradients(model)) == 4
    assert all(gradient is None or not gradient.any() for gradient in router_gradients(model))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gate", ["straight_through", "softmax"])
def test_with_the_other_gates_the_task_gives_every_router_a_gradient(gate, path):
    model = tiny_mole(gate=gate, balance="none", expert_path=path)
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(gradient.any() for gradient in router_gradients(model))


def test_straight_through_gives_the_output_as_released():
    logits = [tiny_mole(gate=gate)(INPUT_IDS).logits for gate in ("straight_through", "none")]
    assert torch.equal(*logits)


def test_as_released_the_output_does_not_depend_on_how_sure_the_router_is():
    model = tiny_mole(**RELEASED)
    before = model(INPUT_IDS).logits
    with torch.no_grad():
        for router in mole_routers(model):
            router.router.weight.mul_(2)
            router.router.bias.mul_(2)
    assert torch.equal(model(INPUT_IDS).logits, before)


def test_as_released_balance_is_by_sample_over_all_layers_and_alone_trains_the_router():
    model = tiny_mole(**RELEASED)
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert not any(gradient is not None and gradient.any() for gradient in router_gradients(model))
    model(INPUT_IDS)
    total, parts = routing_loss(model)
    probs_LTX, picks_LTX = (routing_context(model).stack(name) for name in ("router_probs_TX", "picks_TX"))
    by_sample = [
        (probs.mean((0, 1)) * picks.mean((0, 1))).sum() * 3
        for probs, picks in zip(probs_LTX.split(7, dim=1), picks_LTX.split(7, dim=1), strict=True)
    ]
    torch.testing.assert_close(parts["balance_loss"], torch.stack(by_sample).mean().detach())
    total.backward()
    assert all(gradient.any() for gradient in router_gradients(model))


# -- AdaMoE: null experts ----------------------------------------------------------------------------------------------


def test_adamoe_weights_sum_to_one_over_the_real_picks():
    model = tiny_mole(**ADAMOE)
    model(INPUT_IDS)
    is_real_LTK = routing_context(model).stack("is_real_TK")
    weights_LTK = routing_context(model).stack("expert_weights_TK")
    assert 0 < is_real_LTK.float().mean() < 1
    torch.testing.assert_close(weights_LTK.sum(-1), is_real_LTK.any(-1).float())
    assert not weights_LTK[~is_real_LTK].any()


def test_with_one_pick_renormalised_softmax_is_refused_since_its_router_would_learn_nothing():
    config = {"top_k": 1, "gate": "softmax", "num_null_experts": 2}
    with pytest.raises(UserError, match="its router learns nothing"):
        MoleConfig(renormalize=True, **config)
    model = tiny_mole(**config)  # by default a lone pick is weighed by p, nulls or not
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(gradient.any() for gradient in router_gradients(model))
    for router in mole_routers(model):
        router.choice = replace(router.choice, renormalize=True)  # what is refused, forced
    model.zero_grad()
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert not any(gradient is not None and gradient.any() for gradient in router_gradients(model))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_when_every_pick_is_null_the_output_is_the_frozen_models_bit_for_bit(dtype, path):
    base = tiny_llama().to(dtype)
    expected = base(INPUT_IDS).logits
    config = MoleConfig(r=2, target_modules=[], expert_path=path, **(ADAMOE | {"top_k": 2}))
    model = wake(get_peft_model(base, config))
    assert not torch.equal(model(INPUT_IDS).logits, expected)
    with torch.no_grad():
        for router in mole_routers(model):
            router.router.bias[3:] = 1000
    assert torch.equal(model(INPUT_IDS).logits, expected)
    assert not routing_context(model).stack("is_real_TK").any()


@pytest.mark.parametrize("gate", ["straight_through", "softmax", "none"])
def test_without_null_experts_it_is_plain_top_k_bit_for_bit(gate):
    model = tiny_mole(gate=gate, num_experts=4, num_null_experts=0, top_k=2, null_balance="averaged")
    model(INPUT_IDS)
    for routing in routing_context(model).routings.values():
        log_probs_TK, ids_TK = routing.router_logits_TX.log_softmax(-1).topk(2)
        weights_TK = log_probs_TK.softmax(-1) if gate == "softmax" else torch.full((21, 2), 0.5)
        assert torch.equal(routing.expert_ids_TK, ids_TK)
        assert torch.equal(routing.expert_weights_TK, weights_TK)
        assert routing.is_real_TK.all()


def test_without_null_experts_null_balance_is_plain_balance_bit_for_bit():
    losses = []
    for null_balance in ("averaged", "each"):
        model = tiny_mole(null_balance=null_balance, num_null_experts=0, top_k=2)
        model(INPUT_IDS)
        losses.append(routing_loss(model)[1]["balance_loss"])
    assert torch.equal(*losses)


def test_null_averaging_does_something_unlike_the_average_over_an_empty_slice():
    losses = {}
    for null_balance in ("averaged", "each"):
        model = tiny_mole(null_balance=null_balance, balance="layer", **ADAMOE)
        with torch.no_grad():
            for router in mole_routers(model):
                router.router.bias[3] += 1  # the nulls are not alike, or there would be nothing to average
        model(INPUT_IDS)
        losses[null_balance] = routing_loss(model)[1]["balance_loss"]
    routings = list(routing_context(model).routings.values())
    by_hand = {
        name: slow_balance(
            "layer",
            routings,
            counted=[1] * 21,
            sample=[0] * 21,
            population=[0] * 21,
            target_PX=[[0.2] * 5],
            null_sets=sets,
        )
        # released: f[:, 3:] where f's second axis has the K = 3 picks, so nothing is averaged
        for name, sets in {"averaged": [slice(3, 5)], "each": []}.items()
    }
    for name, loss in losses.items():
        torch.testing.assert_close(loss, by_hand[name].detach())
    assert abs(losses["averaged"] - losses["each"]) > 1e-3


# -- MoMa: groups by modality ------------------------------------------------------------------------------------------

GROUPS = {"expert_groups": {"text": 2, "image": 2, "shared": 1}, "num_null_experts": 1, "top_k": 2}
PROMPTS = ["USER: <image>\nWhat colour is the square? ASSISTANT:", "<image> USER: <image>\nyes no ASSISTANT: red"]


@pytest.fixture(scope="module")
def grouped_llava():
    model, processor = tiny_llava()
    processor.tokenizer.padding_side = "left"
    torch.manual_seed(0)
    return wake(get_peft_model(model, MoleConfig(r=2, **GROUPS))).eval(), processor


def batch(processor):
    """Left padding in the first row, two pictures in the second."""
    images = [tiny_image(colour) for colour in ("red", "blue", "green")]
    inputs = processor(images=images, text=PROMPTS, padding=True, return_tensors="pt")
    assert (inputs.attention_mask[0, 0], inputs.attention_mask[1, 0]) == (0, 1)
    return inputs


def follow(model):
    """Collects, forward by forward, (is_image_T, expert_ids_LTK) until the hook is removed."""
    context, seen = routing_context(model), []
    hook = model.get_base_model().register_forward_hook(
        lambda *_: seen.append((context.is_image_T, context.stack("expert_ids_TK")))
    )
    return seen, hook


def assert_own_and_shared_experts_alone(model, is_image_T, expert_ids_LTK):
    owners = [*model.peft_config["default"].layout.group_of_expert, "text", "image"]
    for token, is_image in enumerate(is_image_T.tolist()):
        met = {owners[expert] for expert in expert_ids_LTK[:, token].flatten().tolist()}
        assert met <= {"image" if is_image else "text", "shared"}


def test_image_tokens_never_meet_text_experts_under_left_padding_and_with_several_images(grouped_llava):
    model, processor = grouped_llava
    seen, hook = follow(model)
    model(**batch(processor))
    hook.remove()
    ((is_image_T, expert_ids_LTK),) = seen
    assert is_image_T.sum() == 3 * 9
    assert_own_and_shared_experts_alone(model, is_image_T, expert_ids_LTK)
    for group in ("text", "image"):  # and not because everybody takes the shared one
        owned = [e for e, owner in enumerate(model.peft_config["default"].layout.group_of_expert) if owner == group]
        assert torch.isin(expert_ids_LTK, torch.tensor(owned)).any()


@pytest.mark.parametrize("num_beams", [1, 2])
def test_image_tokens_never_meet_text_experts_in_generation_with_a_cache_and_beams(grouped_llava, num_beams):
    model, processor = grouped_llava
    seen, hook = follow(model)
    model.generate(**batch(processor), max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=num_beams)
    hook.remove()
    assert len(seen) == 3
    assert seen[0][0].sum() == 3 * 9 * num_beams
    assert [len(is_image_T) for is_image_T, _ in seen[1:]] == [2 * num_beams] * 2
    for is_image_T, expert_ids_LTK in seen:
        assert_own_and_shared_experts_alone(model, is_image_T, expert_ids_LTK)


@pytest.mark.parametrize("path", PATHS)
def test_what_a_text_expert_holds_does_not_reach_an_image_token(path):
    base, processor = tiny_llava()
    model = wake(get_peft_model(base, MoleConfig(r=2, expert_path=path, **GROUPS))).eval()
    block, outputs = model.get_base_model().get_decoder().layers[0].mlp, []
    block.register_forward_hook(lambda module, args, output: outputs.append(output.flatten(0, 1)))
    inputs = batch(processor)
    model(**inputs)
    with torch.no_grad():
        for linear in ("gate_proj", "up_proj", "down_proj"):
            getattr(block.base_layer, linear).mole_experts["default"].B[:4] += (
                1  # ids 0 and 1, rank 2: the text experts
            )
    model(**inputs)
    is_image_T = routing_context(model).is_image_T
    assert torch.equal(outputs[0][is_image_T], outputs[1][is_image_T])
    assert not torch.equal(outputs[0][~is_image_T], outputs[1][~is_image_T])


def llava_step(use_reentrant, **config):
    """Loss, routing losses, statistics, gradients and picks of one training step of a LLaVA."""
    base, processor = tiny_llava()
    torch.manual_seed(0)
    model = wake(get_peft_model(base, MoleConfig(r=2, z_loss_weight=0.1, balance_loss_weight=0.5, **config))).train()
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    inputs = batch(processor)
    loss = model(**inputs, labels=inputs.input_ids).loss
    extra, parts = routing_loss(model)
    stats = RoutingStats()
    stats.update(routing_context(model), ["general", "document"])
    recorded = [routing.expert_ids_TK for routing in routing_context(model).routings.values()]
    (loss + extra).backward()
    after = [routing.expert_ids_TK for routing in routing_context(model).routings.values()]
    assert all(left is right for left, right in zip(recorded, after, strict=True))  # recomputation is not recorded
    assert_own_and_shared_experts_alone(model, routing_context(model).is_image_T, torch.stack(after))
    return loss.detach(), parts, stats.to_json(), gradients(model)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("balance", ["global_batch", "sample"])
def test_groups_and_nulls_count_and_learn_the_same_under_activation_checkpointing(balance, path):
    config = GROUPS | {"balance": balance, "expert_path": path}
    plain, checkpointed = llava_step(None, **config), llava_step(False, **config)
    assert torch.equal(plain[0], checkpointed[0])
    assert plain[1] == checkpointed[1]
    assert plain[2] == checkpointed[2]
    assert plain[3].keys() == checkpointed[3].keys()
    for name, gradient in plain[3].items():
        torch.testing.assert_close(checkpointed[3][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_groups_under_reentrant_checkpointing_are_refused_with_the_reason():
    with pytest.raises(UserError, match=r"carries no gradient.*use_reentrant=False"):
        llava_step(True, **GROUPS)
