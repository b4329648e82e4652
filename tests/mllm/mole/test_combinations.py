"""Every combination of switches that is meant to work equals its definition; every other one is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm.common.errors import UserError
from mllm.mole import MoleConfig, routing_context, routing_loss
from mllm.mole.config import BALANCES
from mllm.routing import GATES, ROUTERS
from tests.mllm.mole.helpers import IMAGE, mole_routers, toy_mole
from tests.mllm.mole.slow import slow_mole
from tests.mllm.routing.slow import assert_close_gradients, few, gradients_of

GROUPS = {"no groups": None, "own": {"text": 2, "image": 1}, "own and shared": {"text": 1, "image": 1, "shared": 1}}
OPTIONS = list(itertools.product(GROUPS, (0, 1, 2), (1, 2, 3)))
IDS = torch.tensor([[1, IMAGE, 2, 3], [IMAGE, IMAGE, 4, 5]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
LOSSES = {"balance_loss_weight": 0.5, "z_loss_weight": 0.1}


def both(model, input_ids=IDS, mask=MASK):
    """Output and training loss, fast and slow, and what they depend on."""
    config = model.peft_config["default"]
    for router in mole_routers(model):
        if router.selection_bias is not None:
            router.selection_bias.copy_(torch.randn_like(router.selection_bias) * 0.2)
    dtype = model.get_base_model().embed.weight.dtype
    offset = torch.randn(*input_ids.shape, 6).to(dtype).requires_grad_()
    fast = model(input_ids, attention_mask=mask, offset=offset)
    extra = routing_loss(model)
    slow, slow_losses = slow_mole(model, input_ids, mask, offset)
    assert set(slow_losses) == (set(extra[1]))
    weights = {"balance_loss": config.balance_loss_weight, "z_loss": config.z_loss_weight}
    for name, loss in slow_losses.items():
        torch.testing.assert_close(extra[1][name], loss.detach(), atol=1e-5, rtol=1e-4)
    cotangent = torch.randn(fast.shape)
    return (
        (fast, slow),
        (
            (fast.float() * cotangent).sum() + extra[0],
            (slow.float() * cotangent).sum() + sum(weights[name] * loss for name, loss in slow_losses.items()),
        ),
        [offset, *(p for p in model.parameters() if p.requires_grad)],
    )


def assert_equals_the_definition(model, input_ids=IDS, mask=MASK):
    outputs, losses, inputs = both(model, input_ids, mask)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)  # worst seen 1.9e-6
    assert_close_gradients(*losses, inputs, atol=2e-5, rtol=2e-4)  # worst seen 3.8e-6


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_balance_group_null_and_k_equals_its_definition_or_is_refused(gate, balance):
    refused = 0
    for groups, nulls, top_k in OPTIONS:
        config = {"expert_groups": GROUPS[groups], "num_experts": None if GROUPS[groups] else 2} | LOSSES
        config |= {"num_null_experts": nulls, "top_k": top_k, "gate": gate, "balance": balance}
        fewest_choices = {"no groups": 2, "own": 1, "own and shared": 2}[groups] + nulls
        if top_k <= fewest_choices:
            assert_equals_the_definition(toy_mole(**config))
            continue
        refused += 1
        with pytest.raises(UserError, match=rf"top_k={top_k} exceeds the \d experts that \w+ tokens"):
            MoleConfig(**config)
    assert refused == 5


@st.composite
def configs(draw):
    """Everything else that may be asked for, together."""
    groups = draw(st.sampled_from(list(GROUPS.values())))
    nulls = draw(st.integers(0, 2))
    if groups and nulls:
        nulls = draw(st.sampled_from([nulls, {"text": 2, "image": 1}]))
    made = {
        "expert_groups": groups,
        "num_experts": None if groups else draw(st.integers(1, 3)),
        "num_null_experts": nulls,
        "gate": draw(st.sampled_from(list(GATES))),
        "balance": draw(st.sampled_from(BALANCES)),
        "expert_path": draw(st.sampled_from(["masked", "sorted"])),
        "use_rslora": draw(st.booleans()),
        "shared_a": draw(st.booleans()),
        "top_p": draw(st.sampled_from([None, 0.5])),
        "router_temperature": draw(st.sampled_from([1.0, 0.3])),
        "modality_prior": draw(st.booleans()),
        "z_loss_weight": draw(st.sampled_from([0.0, 0.3])),
    }
    if nulls:
        made["null_logits"] = draw(st.sampled_from(["own", "shared"]))
        made["null_balance"] = draw(st.sampled_from(["averaged", "each"]))
    if groups and not made["shared_a"] and draw(st.booleans()):
        made["r"] = dict(zip(groups, (1, 3, 2), strict=False))
    fewest = int(MoleConfig(**(made | {"top_k": 1})).layout.allowed_PX.sum(1).min())
    made["top_k"] = draw(st.integers(1, min(fewest, 3)))
    fewest_nulls = min(nulls.values()) if isinstance(nulls, dict) else nulls
    if made["balance"] != "none" and 0.7 * made["top_k"] <= fewest_nulls:
        made["real_share"] = draw(st.sampled_from([None, 0.3]))
    renormalize = [None, False] if made["top_k"] == 1 and made["gate"] == "softmax" else [None, False, True]
    return made | {"renormalize": draw(st.sampled_from(renormalize))}


@few(50)
@given(configs(), st.sampled_from(["block", "linear"]), st.integers(0, 1000), st.integers(1, 2), st.integers(1, 4))
def test_any_mixture_of_options_equals_its_definition(config, router_input, seed, rows, length):
    model = toy_mole(seed, router_input=router_input, **config)
    for router in mole_routers(model):
        if router.router.prior is not None:
            torch.nn.init.normal_(router.router.prior)
    ids = torch.randint(IMAGE - 2, IMAGE + 1, (rows, length))
    assert_equals_the_definition(model, ids, (torch.rand(rows, length) < 0.8).long())


@few(25)
@given(configs(), st.integers(0, 1000))
def test_in_bf16_outputs_losses_and_all_gradients_stay_near_the_definition(config, seed):
    (fast, slow), losses, inputs = both(toy_mole(seed, torch.bfloat16, **config))
    assert fast.dtype == torch.bfloat16
    pairs = zip([fast, *gradients_of(losses[0], inputs)], [slow, *gradients_of(losses[1], inputs)], strict=True)
    for left, right in pairs:
        assert (left.float() - right.float()).norm() <= 0.02 * right.float().norm() + 1e-3  # bf16 keeps 8 bits


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("path", ["masked", "sorted"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_router_equals_its_definition_on_both_paths(name, path, top_k):
    domains = {"expert_domains": ["general", "document"]} if name == "oracle_domain" else {}
    model = toy_mole(router=name, balance="none", expert_path=path, top_k=top_k, num_experts=3, **domains)
    routing_context(model).set_domains(["document", "general"])
    assert_equals_the_definition(model)
