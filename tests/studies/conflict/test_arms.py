"""Every arm is a valid adapter, and the controls are what they are said to be."""

import pytest
import torch
from peft import get_peft_model

from mllm.common.errors import UserError
from mllm.mole import MoleConfig, MoleLinear
from studies.conflict.arms import ARMS, GROUPS, LORA, adapter_of, adapter_values, own_arm
from studies.conflict.config import AdapterSection
from tests.tiny import tiny_language_model, tiny_llava

DOMAINS = ["biomedical", "document", "general"]
FRAME = AdapterSection(r=2, lora_alpha=4).model_dump()
INPUT_IDS = torch.arange(24).reshape(2, 12)


def adapted(values: dict, base: torch.nn.Module | None = None) -> torch.nn.Module:
    model = get_peft_model(base or tiny_language_model(), MoleConfig(**values)).eval()
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad and name.endswith(".B"):
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.mark.parametrize("experts", [2, 3, 4, 9])
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_makes_an_adapter_for_any_number_of_experts(name, experts):
    values = adapter_values(ARMS[name], FRAME | {"num_experts": experts}, DOMAINS)
    if name == "full":
        assert adapter_of(ARMS[name], values) is None
        return
    adapter = adapter_of(ARMS[name], values)
    assert adapter.num_experts == (1 if ARMS[name].settings is LORA else experts)
    assert adapter.modules_to_save == []
    assert (adapter.r, adapter.lora_alpha) == (2, 4)


@pytest.mark.parametrize("name", [name for name in ARMS if name not in ("full", "mole_oracle")])
def test_every_arm_runs_on_a_model(name):
    base, _ = tiny_llava()
    assert adapted(adapter_values(ARMS[name], FRAME, DOMAINS), base)(input_ids=INPUT_IDS).logits.isfinite().all()


def test_main_and_all_name_arms_of_the_table():
    assert set(GROUPS["main"]) < set(GROUPS["all"]) == set(ARMS)


def test_mix_is_plain_lora():
    model = adapted(adapter_values(ARMS["mix"], FRAME, DOMAINS))
    (name, linear), *_ = ((n, m) for n, m in model.named_modules() if isinstance(m, MoleLinear))
    seen = {}
    linear.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    model(INPUT_IDS)
    A, B = (weight.data for weight in linear.mole_experts.parameters())
    assert "mlp" in name
    assert torch.allclose(seen["y"], linear.base_layer(seen["x"]) + 4 / 2 * seen["x"] @ A.T @ B, atol=1e-6)


def trained(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_wide_is_lora_of_e_times_the_rank_in_weights_and_in_what_it_computes():
    wide = adapted(adapter_values(ARMS["wide"], FRAME, DOMAINS))
    lora = adapted(adapter_values(ARMS["mix"], FRAME | {"r": 6, "lora_alpha": 12}, DOMAINS))
    assert trained(wide) == trained(lora)
    weights = {name: weight for name, weight in wide.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if weight.requires_grad:
                weight.copy_(weights[name].reshape(weight.shape))
    assert torch.allclose(wide(INPUT_IDS).logits, lora(INPUT_IDS).logits, atol=1e-5)


def test_the_experts_have_the_weights_of_wide_and_a_router():
    wide, mole = (adapted(adapter_values(ARMS[name], FRAME, DOMAINS)) for name in ("wide", "mole"))
    router = sum(weight.numel() for name, weight in mole.named_parameters() if "mole_router" in name)
    assert trained(mole) == trained(wide) + router > trained(wide)


def test_an_own_arm_may_have_slow_routers():
    arm = own_arm("slow", {"top_k": 2, "router_rate": 0.1})
    assert (arm.router_rate, own_arm("warm", {}).router_rate) == (0.1, 1.0)
    assert adapter_of(arm, adapter_values(arm, FRAME, DOMAINS)).top_k == 2


def test_an_own_arm_goes_over_the_frame_and_is_refused_by_name():
    assert adapter_of(own_arm("warm", {}), adapter_values(own_arm("warm", {"top_k": 2}), FRAME, DOMAINS)).top_k == 2
    for settings, said in (
        ({"topk": 2}, "arm odd.topk .*did you mean top_k"),
        ({"top_k": 9}, "arm odd\.top_k=9 exceeds"),
    ):
        odd = own_arm("odd", settings)
        with pytest.raises(UserError, match=said):
            adapter_of(odd, adapter_values(odd, FRAME, DOMAINS))
