import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm.routing import BALANCE_LOSSES, BalanceWindow, ExpertLayout, Routing, Target, route, z_loss
from mllm.routing.losses import moved_selection_bias, scheduled
from tests.mllm.routing.slow import assert_close_gradients, few, slow_balance, slow_target

COUNTED = torch.tensor([True, True, True, False])
SAMPLE = torch.tensor([0, 0, 1, 1])
GROUPS = [None, {"text": 2, "image": 1}, {"text": 1, "image": 1, "shared": 1}]


def picks(ids_LTK, num_experts):
    ids_LTK = torch.as_tensor(ids_LTK)
    return torch.zeros(*ids_LTK.shape[:2], num_experts).scatter(2, ids_LTK, 1.0)


def loss(kind, probs_LTX, ids_LTK, counted=None, sample=None, **options):
    probs_LTX = torch.as_tensor(probs_LTX)
    tokens, num_experts = probs_LTX.shape[1:]
    return BALANCE_LOSSES[kind](
        router_probs_LTX=probs_LTX,
        picks_LTX=picks(ids_LTK, num_experts),
        is_counted_T=torch.ones(tokens, dtype=torch.bool) if counted is None else counted,
        sample_T=torch.zeros(tokens, dtype=torch.long) if sample is None else sample,
        **{"population_T": torch.zeros(tokens, dtype=torch.long), "target": Target.of(ExpertLayout.of(num_experts))}
        | options,
    )


@st.composite
def batches(draw):
    """Routings of some layers over some rows, what counts, who is who, and a target."""
    groups, nulls = draw(st.sampled_from(GROUPS)), draw(st.integers(0, 2))
    layout = ExpertLayout.of(3, groups, nulls)
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    image_T = torch.rand(rows * length, generator=generator) < 0.5
    population_T = image_T.long() if groups else torch.zeros(rows * length, dtype=torch.long)
    logits_LTX = torch.randn(draw(st.integers(1, 3)), rows * length, 3 + layout.num_null_experts, generator=generator)
    options = {
        "top_k": draw(st.integers(1, int(layout.allowed_PX.sum(1).min()))),
        "top_p": draw(st.sampled_from([None, 0.5])),
        "allowed_TX": layout.allowed_PX[population_T],
    }
    tokens = {
        "is_counted_T": torch.rand(rows * length, generator=generator) < 0.8,
        "sample_T": torch.arange(rows).repeat_interleave(length),
        "population_T": population_T,
    }
    real_share = draw(st.sampled_from([None, 0.3])) if nulls else None
    return logits_LTX, options, tokens, layout, real_share, draw(st.sampled_from(["averaged", "each"]))


@few(120)
@given(batches(), st.sampled_from(list(BALANCE_LOSSES)))
def test_every_balance_loss_and_its_gradient_equal_the_definition_token_by_token(drawn, kind):
    values_LTX, options, tokens, layout, real_share, null_balance = drawn
    logits_LTX = values_LTX.clone().requires_grad_()
    routings = [route(logits_TX, gate="none", num_experts=3, **options) for logits_TX in logits_LTX]
    fast = BALANCE_LOSSES[kind](
        router_probs_LTX=torch.stack([r.router_probs_TX for r in routings]),
        picks_LTX=torch.stack([r.picks_TX for r in routings]),
        target=Target.of(layout, real_share, null_balance),
        **tokens,
    )
    slow = slow_balance(
        kind,
        routings,
        counted=tokens["is_counted_T"].tolist(),
        sample=tokens["sample_T"].tolist(),
        population=tokens["population_T"].tolist(),
        target_PX=slow_target(layout, real_share),
        null_sets=layout.null_sets if null_balance == "averaged" else (),
    )
    torch.testing.assert_close(fast, slow)
    assert_close_gradients(fast, slow, [logits_LTX], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_even_routing_costs_one(kind):
    probs = torch.full((3, 4, 2), 0.5)
    ids = torch.tensor([0, 1, 0, 1]).view(1, 4, 1).expand(3, 4, 1)
    torch.testing.assert_close(loss(kind, probs, ids, sample=SAMPLE), torch.tensor(1.0))


@pytest.mark.parametrize("real_share", [None, 0.25])
@pytest.mark.parametrize("groups", [None, {"text": 2, "image": 2}])
@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_routing_on_target_costs_one_whatever_the_target(kind, groups, real_share):
    layout = ExpertLayout.of(4, groups, 2)
    target_PX = layout.target_PX(real_share)
    population_T = torch.arange(8) % len(target_PX)
    probs_LTX = target_PX[population_T][None]
    value = BALANCE_LOSSES[kind](
        router_probs_LTX=probs_LTX,
        picks_LTX=probs_LTX * 3,  # as if every token had split its three picks as it should
        is_counted_T=torch.ones(8, dtype=torch.bool),
        sample_T=torch.arange(8) // 4,
        population_T=population_T,
        target=Target.of(layout, real_share),
    )
    torch.testing.assert_close(value, torch.tensor(1.0))


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_collapsed_routing_costs_the_number_of_experts(kind):
    probs = torch.tensor([1.0, 0, 0]).expand(2, 4, 3)
    torch.testing.assert_close(loss(kind, probs, torch.zeros(2, 4, 1, dtype=torch.long)), torch.tensor(3.0))


@pytest.mark.parametrize("kind", ["layer", "global_batch"])
def test_the_layer_loss_by_hand_without_the_padded_token(kind):
    probs = [[[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.0, 1.0]]]
    ids = [[[0], [0], [1], [1]]]
    # f = (2/3, 1/3), P = (1.5/3, 1.5/3): 2 · (2/3 · 0.5 + 1/3 · 0.5) = 1
    torch.testing.assert_close(loss(kind, probs, ids, COUNTED), torch.tensor(1.0))
    # with the last token f = (1/2, 1/2), P = (1.5/4, 2.5/4): 1 as well, so other picks tell them apart
    ids = [[[0], [0], [0], [1]]]
    # f = (1, 0): 2 · 0.5 = 1; with the last token f = (3/4, 1/4): 2 · (0.75 · 0.375 + 0.25 · 0.625) = 0.875
    torch.testing.assert_close(loss(kind, probs, ids, COUNTED), torch.tensor(1.0))
    torch.testing.assert_close(loss(kind, probs, ids), torch.tensor(0.875))


def test_with_two_picks_shares_are_shares_of_picks():
    probs = [[[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]]
    # f = (2, 1, 1) / 4: 3 · (0.5 · 0.5 + 0.25 · 0.3 + 0.25 · 0.2) = 1.125
    torch.testing.assert_close(loss("layer", probs, [[[0, 1], [0, 2]]]), torch.tensor(1.125))


def test_the_sample_loss_by_hand_pools_the_layers_of_each_sample():
    probs = [[[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.0, 1.0]], [[0.4, 0.6], [0.2, 0.8], [0.3, 0.7], [1.0, 0.0]]]
    ids = [[[0], [0], [1], [1]], [[1], [1], [1], [0]]]
    # sample 0: f = (2/4, 2/4), P = (2.0/4, 2.0/4): 0.5
    # sample 1, its padded token left out: f = (0, 1), P = (0.2, 0.8): 0.8
    torch.testing.assert_close(loss("sample", probs, ids, COUNTED, SAMPLE), torch.tensor(2 * (0.5 + 0.8) / 2))


def test_a_sample_of_padding_alone_does_not_count():
    probs, ids = torch.rand(1, 4, 2).softmax(-1), torch.tensor([[[0], [1], [1], [1]]])
    only_first = torch.tensor([True, True, False, False])
    left = loss("sample", probs, ids, only_first, SAMPLE)
    torch.testing.assert_close(left, loss("sample", probs[:, :2], ids[:, :2]))


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_the_gradient_of_a_padded_token_is_zero_and_of_others_is_not(kind):
    probs = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
    ids = probs.detach().topk(1, dim=-1).indices
    loss(kind, probs, ids, COUNTED, SAMPLE).backward()
    assert not probs.grad[:, 3].any()
    assert probs.grad[:, :3].abs().sum(-1).all()


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_a_batch_of_padding_alone_costs_nothing_and_is_finite(kind):
    value = loss(kind, torch.rand(1, 2, 3), torch.zeros(1, 2, 1, dtype=torch.long), torch.tensor([False, False]))
    assert value == 0


def null_losses(null_balance, ids_LTK):
    """One real expert and two null ones, the nulls of unequal probability."""
    target = Target.of(ExpertLayout.of(1, None, 2), null_balance=null_balance)
    return loss("layer", torch.tensor([[[0.5, 0.4, 0.1]]]).expand(1, 4, 3), ids_LTK, target=target)


def test_averaged_nulls_cost_the_same_however_picks_are_spread_among_them():
    one, both = [[[0], [0], [1], [1]]], [[[0], [0], [1], [2]]]
    # f = (1/2, 1/4, 1/4) for both: 3 · (1/2 · 0.5 + 1/4 · 0.5) = 1.125
    assert null_losses("averaged", one) == null_losses("averaged", both)
    torch.testing.assert_close(null_losses("averaged", one), torch.tensor(1.125))


def test_averaging_does_something_which_a_slice_of_the_wrong_axis_did_not():
    ids = [[[0], [0], [1], [1]]]
    # one by one f = (1/2, 1/2, 0): 3 · (1/2 · 0.5 + 1/2 · 0.4) = 1.35. AdaMoE's Mixtral code averages over an empty
    # slice, the top-k axis from num_experts on, and gets exactly this
    torch.testing.assert_close(null_losses("each", ids), torch.tensor(1.35))
    assert null_losses("averaged", ids) < null_losses("each", ids)


def test_under_averaged_nulls_the_gradient_of_all_nulls_of_a_set_is_the_same():
    probs = torch.tensor([[[0.5, 0.4, 0.1]]]).expand(1, 4, 3).clone().requires_grad_()
    target = Target.of(ExpertLayout.of(1, None, 2))
    loss("layer", probs, [[[0], [0], [1], [1]]], target=target).backward()
    assert torch.equal(probs.grad[..., 1], probs.grad[..., 2])
    assert probs.grad[..., 1].all()


def test_balance_by_sample_punishes_a_specialised_sample_where_the_global_batch_does_not():
    # two samples of two domains, each with an expert of its own
    probs = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    ids = [[[0], [0], [1], [1]]]
    assert loss("sample", probs, ids, sample=SAMPLE) == 2
    assert loss("global_batch", probs, ids, sample=SAMPLE) == 1


def test_balance_by_sample_forgives_a_collapsed_layer_when_another_makes_up_for_it():
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, None].expand(2, 4, 2)
    ids = torch.tensor([0, 1]).view(2, 1, 1).expand(2, 4, 1)
    assert loss("sample", probs, ids) == 1
    assert loss("layer", probs, ids) == 2


def test_a_modality_is_balanced_among_its_own_experts_alone():
    layout = ExpertLayout.of(4, {"text": 2, "image": 2})
    population_T = torch.tensor([0, 0, 0, 1])  # three text tokens, one image token
    probs = torch.tensor([[[0.5, 0.5, 0, 0]] * 3 + [[0, 0, 1.0, 0]]])
    value = loss("layer", probs, [[[0], [1], [0], [2]]], population_T=population_T, target=Target.of(layout))
    # text: P even, so 1 whatever f; image: all on one of two, 2; by their tokens (3 · 1 + 2) / 4
    torch.testing.assert_close(value, torch.tensor(1.25))


def test_the_window_counts_the_step_so_far_and_forgets_it_after():
    window = BalanceWindow()
    even, skewed = [[[0], [1], [0], [1]]], [[[0], [0], [0], [0]]]
    probs = torch.tensor([[[0.8, 0.2]]]).expand(1, 4, 2)
    first = loss("global_batch", probs, skewed, window=window)
    # the first micro-batch has all four picks on expert 0: 2 · 0.8; then six of eight: 2 · (6/8 · 0.8 + 2/8 · 0.2)
    torch.testing.assert_close(first, torch.tensor(1.6))
    torch.testing.assert_close(loss("global_batch", probs, even, window=window), torch.tensor(1.3))
    window.reset()
    torch.testing.assert_close(loss("global_batch", probs, even, window=window), torch.tensor(1.0))


def choose(bias_X, scores_TX, top_k=1):
    return route(scores_TX, top_k=top_k, gate="none", selection_bias_X=bias_X)


@pytest.mark.parametrize("real_share", [None, 0.25])
def test_a_moved_bias_brings_the_load_to_its_target(real_share):
    layout = ExpertLayout.of(3, None, 1)
    target = Target.of(layout, real_share)
    scores_TX = torch.randn(600, 4) + torch.tensor([2.0, 1.0, 0.0, -1.0])
    bias_X = torch.zeros(4)

    def distance(routing: Routing):
        return (routing.picks_TX.mean(0) - target.share_PX[0]).abs().max()

    before = distance(choose(bias_X, scores_TX))
    for _ in range(200):
        counts_PX = choose(bias_X, scores_TX).picks_TX.sum(0, keepdim=True)
        bias_X = moved_selection_bias(bias_X, counts_PX, target, 0.01)
    assert before > 0.3
    assert distance(choose(bias_X, scores_TX)) < 0.05


def test_null_experts_of_a_set_move_together():
    target = Target.of(ExpertLayout.of(2, None, 2))
    moved = moved_selection_bias(torch.zeros(4), torch.tensor([[2.0, 4.0, 7.0, 0.0]]), target, 0.1)
    torch.testing.assert_close(moved, torch.tensor([0.1, -0.1, -0.1, -0.1]))
    each = Target.of(ExpertLayout.of(2, None, 2), null_balance="each")
    moved = moved_selection_bias(torch.zeros(4), torch.tensor([[2.0, 4.0, 7.0, 0.0]]), each, 0.1)
    torch.testing.assert_close(moved, torch.tensor([0.1, -0.1, -0.1, 0.1]))


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [("constant", [3, 3, 3, 3, 3]), ("linear", [3, 2.5, 2, 1.5, 1]), ("step", [3, 3, 1, 1, 1])],
)
def test_a_scheduled_weight_goes_its_way_and_stays_within_it(schedule, weights):
    assert [scheduled(3, 1, schedule, progress) for progress in (0, 0.25, 0.5, 0.75, 1)] == weights
    assert scheduled(3, 1, schedule, -1) == weights[0]
    assert scheduled(3, 1, schedule, 2) == weights[-1]


def test_without_a_final_weight_the_first_one_stays():
    assert scheduled(3, None, "linear", 1) == 3


def test_the_z_loss_is_the_mean_squared_logsumexp_of_counted_tokens():
    logits = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [50.0, 0.0]]])
    expected = (2 * math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 3
    assert z_loss(router_logits_LTX=logits, is_counted_T=COUNTED).item() == pytest.approx(expected)


def test_the_z_loss_is_finite_where_a_token_may_not_take_an_expert():
    logits = torch.tensor([[[0.0, 1.0, 2.0]]], requires_grad=True)
    routed = route(logits[0], top_k=1, gate="none", allowed_TX=torch.tensor([[True, True, False]]))
    value = z_loss(router_logits_LTX=routed.router_logits_TX[None], is_counted_T=COUNTED[:1])
    value.backward()
    assert value.item() == pytest.approx(math.log(1 + math.e) ** 2)
    assert torch.isfinite(logits.grad).all()
