"""What MoleConfig refuses, each with its reason, and what it works out by itself."""

import json

import pytest

from mllm.common.errors import UserError
from mllm.mole import MoleConfig
from mllm.routing import Router

GROUPS = {"text": 2, "image": 2}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"gate": "sigmoid"}, "straight_through, softmax, none"),
        ({"balance": "micro"}, "global_batch, layer, sample, bias, none"),
        ({"router": "learnt"}, r"Did you mean 'learned'\?"),
        ({"router_input": "layer"}, "block, linear"),
        ({"null_logits": "common"}, "own, shared"),
        ({"null_balance": "none"}, "averaged, each"),
        ({"balance_schedule": "cosine"}, "constant, linear, step"),
        ({"expert_path": "fast"}, "auto, masked, sorted"),
        ({"r": 0}, "r must be at least 1"),
        ({"r": {"all": 0}}, "r must be at least 1"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"num_null_experts": -1}, "num_null_experts must not be negative"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
        ({"drop_share": 1.0}, "drop_share must be in"),
        ({"router_jitter": -0.1}, "router_jitter must be in"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"real_share": 1.5, "num_null_experts": 1}, r"real_share must be in \(0, 1\]"),
        ({"balance_loss_weight": -1.0}, "balance_loss_weight must not be negative"),
        ({"balance_final_weight": -1.0, "balance_schedule": "step"}, "balance_final_weight must not be negative"),
        ({"z_loss_weight": -1.0}, "z_loss_weight must not be negative"),
        ({"bias_update_rate": -1.0}, "bias_update_rate must not be negative"),
        ({"router_temperature": 0.0}, "router_temperature must be above 0"),
        ({"target_modules": "all-linear"}, "attention projections"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_right(config, said):
    with pytest.raises(UserError, match=said):
        MoleConfig(**config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"top_k": 5}, "top_k=5 exceeds the 4 experts that all tokens can take"),
        ({"top_k": 3, "expert_groups": {"text": 3, "image": 1}}, "exceeds the 1 experts that image tokens can take"),
        ({"num_experts": 3, "expert_groups": GROUPS}, "num_experts=3, but .* hold 4"),
        ({"expert_groups": {"text": 2, "picture": 2}}, "a group 'picture'; groups are text, image, shared"),
        ({"num_null_experts": {"text": 1}}, "there are no expert_groups"),
        ({"r": {"text": 2}, "expert_groups": GROUPS}, "must name the expert groups: text, image"),
        ({"r": {"text": 2}}, "must name the expert groups: all"),
        ({"r": {"text": 2, "image": 4}, "expert_groups": GROUPS, "shared_a": True}, "shared_a needs one rank"),
        ({"real_share": 0.5}, "real_share needs num_null_experts"),
        ({"real_share": 1.0, "num_null_experts": 2}, "real_share must be below 1"),
        (
            {"real_share": 0.5, "expert_groups": GROUPS, "num_null_experts": {"image": 1}},
            "real_share with groups needs null experts for each modality",
        ),
        ({"null_logits": "shared"}, "needs num_null_experts"),
        (
            {"modality_prior": True, "router": "frozen_random", "balance": "none"},
            'modality_prior needs router="learned"',
        ),
        ({"router_jitter": 0.1, "router": "frozen_random", "balance": "none"}, 'router_jitter needs router="learned"'),
        ({"router_temperature": 2.0, "router": "hash_token", "balance": "none"}, "has no router_temperature"),
        ({"z_loss_weight": 0.1, "router": "frozen_random", "balance": "none"}, "z_loss_weight must be 0"),
        (
            {"expert_domains": ["general"], "router": "frozen_random", "balance": "none"},
            'expert_domains needs router="oracle_domain", or one that learns',
        ),
        ({"router": "hash_token", "balance": "none", "router_reads": "both"}, "decides by rule and reads nothing"),
        ({"router_start": "clusters", "expert_domains": ["general"]}, 'clusters" goes without labels'),
        ({"router_start": "clusters", "router_reads": "token"}, 'clusters" needs a router that reads pictures'),
        ({"router_input": "linear", "router_reads": "picture"}, 'router_reads="picture" or "both" needs router_input'),
        ({"router": "oracle_domain", "balance": "none"}, "needs expert_domains"),
        ({"router": "frozen_random"}, "'frozen_random' does not learn, so balance must be \"none\""),
        ({"router": "hash_token", "balance": "bias"}, "'hash_token' decides by rule, so balance must be \"none\""),
        ({"router": "hash_token", "balance": "none", "num_null_experts": 1}, "cannot choose null experts"),
        ({"router": "oracle_modality", "balance": "none", "expert_groups": GROUPS}, "or go by groups"),
        ({"renormalize": True, "top_k": 1, "gate": "softmax"}, "its router learns nothing"),
        ({"balance_final_weight": 0.0}, "balance_final_weight and balance_schedule come together"),
        ({"balance_schedule": "linear"}, "balance_final_weight and balance_schedule come together"),
    ],
)
def test_switches_that_do_not_go_together_are_refused_with_the_reason(config, said):
    with pytest.raises(UserError, match=said):
        MoleConfig(**config)


@pytest.mark.parametrize(("num_experts", "path"), [(8, "masked"), (9, "sorted")])
def test_the_path_follows_from_the_number_of_experts_unless_it_is_named(num_experts, path):
    assert MoleConfig(num_experts=num_experts).expert_path == path
    assert MoleConfig(num_experts=num_experts, expert_path="sorted").expert_path == "sorted"


def test_groups_hold_the_experts_and_may_have_a_rank_each():
    config = MoleConfig(r={"shared": 1, "image": 8, "text": 4}, expert_groups={"shared": 1, "image": 2, "text": 1})
    assert config.num_experts == 4
    assert config.layout.group_of_expert == ["text", "image", "image", "shared"]
    assert config.ranks == [4, 8, 8, 1]
    assert config.plain_rank == 8


def test_a_saved_config_describes_the_same_experts_in_the_same_order(tmp_path):
    config = MoleConfig(expert_groups={"text": 2, "image": 1}, num_null_experts={"text": 1, "image": 2}, r=3)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(saved["expert_groups"]) == ["image", "text"]  # PEFT sorts names
    loaded = MoleConfig.from_pretrained(tmp_path)
    assert loaded.layout == config.layout
    assert loaded.layout.group_of_expert == config.layout.group_of_expert
    assert loaded.layout.null_sets == config.layout.null_sets
    assert list(loaded.layout.nulls) == list(config.layout.nulls)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_null_experts": 4, "real_share": 0.5, "balance": "none"}, "real_share is an aim of balance"),
        ({"num_null_experts": 4, "real_share": 0.5, "balance_loss_weight": 0.0}, "real_share is an aim of balance"),
        ({"num_null_experts": 1, "top_k": 4, "real_share": 0.5}, "cannot be met"),
        (
            {"balance": "bias", "balance_schedule": "linear", "balance_final_weight": 0.1},
            "needs a balance loss",
        ),
    ],
)
def test_what_would_do_nothing_or_cannot_be_met_is_refused(fields, reason):
    with pytest.raises(UserError, match=reason):
        MoleConfig(**fields)


class Plain(Router):
    """A router of somebody else's that goes by none of the settings."""

    def forward(self, hidden_TD, tokens):
        return hidden_TD.float()


@pytest.mark.parametrize(
    "setting",
    [
        {"router_temperature": 2.0},
        {"router_jitter": 0.1},
        {"modality_prior": True},
        {"null_logits": "shared", "num_null_experts": 2},
        {"router_start": "clusters", "router_reads": "both"},
    ],
)
def test_a_setting_that_a_new_router_does_not_go_by_is_refused(setting, monkeypatch):
    MoleConfig(**setting)
    monkeypatch.setattr("mllm.mole.config.find_router", lambda name: Plain)
    with pytest.raises(UserError, match=rf"{next(iter(setting))} needs|router='learned' has no"):
        MoleConfig(**setting)


def test_a_new_router_that_is_no_linear_map_is_not_started_from_pictures(monkeypatch):
    config = MoleConfig(expert_domains=["a", "b"], router_reads="both")
    assert config.starts_from_pictures
    monkeypatch.setattr("mllm.mole.config.find_router", lambda name: Plain)
    assert not config.starts_from_pictures
