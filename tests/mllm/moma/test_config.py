import pytest
from transformers import AutoConfig

from mllm.common.errors import UserError
from mllm.moma import MomaConfig, layers_at_equal_flops
from tests.mllm.moma.helpers import CODES, TOKEN_CHOICE, VOCAB, tiny_config


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("dense", {"all": 1}),
        ("8x", {"all": 8}),
        ("1t1i", {"text": 1, "image": 1}),
        ("6t2i", {"text": 6, "image": 2}),
        ("2t2i1s", {"text": 2, "image": 2, "shared": 1}),
    ],
)
def test_a_preset_is_named_by_its_groups(name, groups):
    assert tiny_config(name).layout.groups == groups


def test_a_preset_of_another_form_is_refused():
    with pytest.raises(UserError, match="write dense, 8x, 4t4i"):
        MomaConfig.preset("big")


def test_a_preset_with_a_field_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="no field 'rooting'; did you mean routing"):
        MomaConfig.preset("4x", rooting="token_choice")


def test_what_transformers_takes_besides_is_taken():
    config = MomaConfig.preset("4x", rope_theta=5e5, attn_implementation="eager", id2label={0: "a"})
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config._attn_implementation == "eager"


def test_null_experts_may_differ_by_modality():
    config = MomaConfig.preset("2t2i", **TOKEN_CHOICE, num_null_experts={"text": 1, "image": 2}, real_share=0.5)
    assert config.layout.nulls == {"text": 1, "image": 2}


def test_image_codes_are_the_last_ids_unless_told_otherwise():
    assert tiny_config().image_token_start == VOCAB - CODES
    assert tiny_config(image_token_start=3).image_token_start == 3


@pytest.mark.parametrize(("layers", "with_depths"), [(8, 14), (24, 40)])
def test_layers_at_equal_flops_are_those_of_the_papers_table(layers, with_depths):
    assert layers_at_equal_flops(layers, 0.25) == with_depths


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"routing": "soft"}, "choose one of expert_choice, token_choice"),
        ({"num_null_experts": 2}, 'set routing="token_choice"'),
        ({"num_experts_per_tok": 2}, 'set routing="token_choice"'),
        ({"routing": "token_choice"}, "the norm cancels the gate of a lone pick"),
        ({**TOKEN_CHOICE, "num_experts_per_tok": 3}, "some tokens choose among 2 experts"),
        ({**TOKEN_CHOICE, "mixture_of_depths": 0.5}, 'go with routing="expert_choice"'),
        ({"mixture_of_depths": 1.0}, "share between 0 and 1"),
        ({"image_token_start": VOCAB - 3}, "do not fit a vocabulary"),
        ({"expert_groups": {"all": 4, "text": 1}}, "'all' stands alone"),
        ({"expert_groups": {"text": 4}}, "image tokens without an expert"),
        ({"expert_groups": {"all": 1}, "shared_expert_intermediate_size": 8}, "nothing beside its FFN"),
        ({**TOKEN_CHOICE, "real_share": 0.5}, "with num_null_experts=0 it must be None"),
        ({**TOKEN_CHOICE, "num_null_experts": 2, "real_share": 1.5}, "in .0, 1."),
        ({**TOKEN_CHOICE, "num_null_experts": -1}, "num_null_experts must be a number from 0 on"),
        ({"router_noise": -1.0}, "router_noise must be a number from 0 on"),
        ({"router_noise": float("nan")}, "router_noise must be a number from 0 on"),
        ({"balance_loss_weight": "1e-2"}, "balance_loss_weight must be a number from 0 on"),
        ({"threshold_momentum": 7.0}, "threshold_momentum must be in"),
    ],
)
def test_values_that_do_not_go_together_are_refused(fields, match):
    with pytest.raises(UserError, match=match):
        MomaConfig(**{"vocab_size": VOCAB, "codebook_size": CODES, "expert_groups": {"text": 2, "image": 2}, **fields})


def test_a_saved_config_is_found_by_its_type_and_stays_the_same(tmp_path):
    config = tiny_config("2t2i1s", mixture_of_depths=0.25, begin_image_token_id=2, end_image_token_id=3)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MomaConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
