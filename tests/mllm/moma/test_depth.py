"""Mixture of depths: layers that work on some tokens only."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm.common.errors import UserError
from mllm.moma.depth import causal_mask
from tests.mllm.moma.helpers import IDS, MASK, scores, tiny_moma, with_auxiliary

SHARE = 0.25


def deep(**fields):
    return tiny_moma("2t2i", **{"mixture_of_depths": SHARE, **fields})


def test_every_other_layer_from_the_first_on_works_on_its_share_of_the_batch():
    model = deep().train()
    scores(model, IDS, attention_mask=MASK)
    chosen = {
        name: int(choice.is_chosen_TE.sum())
        for name, choice in model.routing_context.choices.items()
        if "depth" in name
    }
    share = math.ceil(SHARE * int(MASK.sum()))
    assert chosen == {"layers.0.depth_router": share, "layers.2.depth_router": share}


def test_masks_of_another_form_are_refused_since_the_layer_makes_its_own():
    tokens = IDS.shape[1]
    with pytest.raises(UserError, match=r"attention_mask \[B, S\]"):
        deep()(IDS, attention_mask=torch.ones(len(IDS), 1, tokens, tokens, dtype=torch.bool))


def test_the_experts_of_such_a_layer_share_out_the_tokens_it_works_on():
    model = deep().train()
    scores(model, IDS)
    context = model.routing_context
    is_worked_T = context.choices["layers.0.depth_router"].is_chosen_TE[:, 0]
    taken_TK = context.routings["layers.0.ffn"].is_taken_TK
    assert taken_TK.sum() == is_worked_T.sum()
    assert not taken_TK[~is_worked_T].any()
    assert context.routings["layers.1.ffn"].is_taken_TK.sum() == IDS.numel()


@pytest.mark.parametrize("preset", ["dense", "2t2i"])
def test_a_token_passed_by_leaves_the_layer_as_it_came_and_a_chosen_one_does_not(preset):
    model = tiny_moma(preset, mixture_of_depths=SHARE)
    layers = {}
    model.model.layers[0].register_forward_hook(lambda _, args, output: layers.update(before=args[0], after=output))
    scores(model.train(), IDS)
    is_worked_BS = model.routing_context.choices["layers.0.depth_router"].is_chosen_TE.view(IDS.shape)
    is_same_BS = (layers["before"] == layers["after"]).all(-1)
    assert torch.equal(is_same_BS, ~is_worked_BS)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_moving_chosen_tokens_together_equals_masking_the_others(implementation):
    model = deep(attn_implementation=implementation)
    gathered = scores(model, IDS, attention_mask=MASK, use_cache=False)
    masked = scores(model, IDS, attention_mask=MASK, use_cache=True)
    torch.testing.assert_close(gathered[MASK == 1], masked[MASK == 1])


def test_both_attentions_are_equal():
    eager = scores(deep(attn_implementation="eager"), IDS, attention_mask=MASK)
    torch.testing.assert_close(scores(deep(), IDS, attention_mask=MASK)[MASK == 1], eager[MASK == 1])


@pytest.mark.parametrize("preset", ["dense", "2t2i"])
def test_gradients_are_finite_and_reach_the_depth_router_also_where_a_row_has_no_chosen_token(preset):
    model = tiny_moma(preset, mixture_of_depths=0.1).train()
    model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    is_worked_BS = model.routing_context.choices["layers.0.depth_router"].is_chosen_TE.view(IDS.shape)
    assert not is_worked_BS.any(1).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.model.layers[0].depth_router.weight.grad.any()


def test_what_is_passed_by_is_not_computed():
    def flops(share):
        model = tiny_moma("dense", mixture_of_depths=share, num_hidden_layers=1).train()
        with FlopCounterMode(display=False) as counter:
            scores(model, IDS)
        return counter.get_total_flops() - 2 * IDS.numel() * 16 * 40  # all but the head

    assert flops(SHARE) < 0.45 * flops(None)  # rows do not hold equally many chosen tokens


def test_beam_search_keeps_each_beams_chosen_tokens():
    model = with_auxiliary(deep(mixture_of_depths=0.5))
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached, recomputed = (model.generate(IDS, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, recomputed)


def test_static_caches_and_attentions_without_such_masks_are_refused():
    with pytest.raises(UserError, match="DynamicCache only"):
        deep().generate(IDS, max_new_tokens=1, cache_implementation="static")
    with pytest.raises(UserError, match="flash_attention_2"):
        causal_mask(torch.ones(1, 2, dtype=torch.bool), 2, "flash_attention_2", torch.float32)
