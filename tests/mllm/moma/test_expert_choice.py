import pytest
import torch

from mllm.moma.context import MomaContext
from mllm.moma.expert_choice import (
    AuxiliaryRouter,
    ChoiceRouter,
    auxiliary_loss,
    batch_choice,
    capacities,
    slow_batch_choice,
)
from mllm.routing import ExpertLayout

WIDTH, IMAGE = 6, 5  # ids below 5 are text
LAYOUTS = {
    "mixed": ExpertLayout.of(8),
    "split": ExpertLayout.of(0, {"text": 4, "image": 3}),
    "shared": ExpertLayout.of(0, {"text": 2, "image": 3, "shared": 2}),
    "lone": ExpertLayout.of(0, {"text": 3, "image": 1}),
    "one": ExpertLayout.of(1),
}


def context(ids, mode="batch", mask=None) -> MomaContext:
    made = MomaContext(IMAGE, 5)
    made.begin(mode=mode, input_ids=ids, attention_mask=mask)
    return made


def choice_router(layout="split", **options) -> ChoiceRouter:
    router = ChoiceRouter(WIDTH, LAYOUTS[layout], **options)
    torch.nn.init.normal_(router.weight)
    return router


def random_batch(rows=3, length=7):
    return torch.randint(0, 10, (rows, length)), torch.randn(rows * length, WIDTH)


def choose(router, ids, hidden, mode="batch", mask=None):
    made = context(ids, mode, mask)
    return router.choose(hidden, made, ~made.is_pad_T)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_text", "num_image"), [(20, 9), (1, 2), (0, 13), (5, 0), (0, 0)])
def test_capacities_sum_to_the_tokens_of_each_modality_and_are_even_up_to_rounding(layout, num_text, num_image):
    layout = LAYOUTS[layout]
    modality_T = torch.tensor([0] * num_text + [1] * num_image, dtype=torch.long)
    allowed_PE = layout.allowed_PX.expand(2, -1)
    capacity_E = capacities(allowed_PE[modality_T])
    assert capacity_E.sum() == num_text + num_image
    if "shared" in layout.groups or not layout.is_grouped:
        return
    for modality, tokens in enumerate((num_text, num_image)):
        of_group = capacity_E[allowed_PE[modality]]
        assert of_group.sum() == tokens
        assert of_group.max() - of_group.min() <= 1


@pytest.mark.parametrize(("share", "taken"), [(0.25, 6), (0.01, 1), (1.0, 21)])
def test_an_expert_alone_takes_its_share_of_tokens_rounded_up(share, taken):
    assert capacities(torch.ones(21, 1, dtype=torch.bool), share).tolist() == [taken]


@pytest.mark.parametrize("seed", range(3))
def test_the_batchs_choice_equals_its_slow_definition_ties_too(seed):
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.randint(0, 4, (30, 5), generator=generator).float()
    is_open_TE = torch.rand(30, 5, generator=generator) < 0.6
    capacity_E = torch.tensor([0, 1, 7, 12, 13])
    expected = slow_batch_choice(scores_TE, is_open_TE, capacity_E)
    is_chosen_TE, lowest_E = batch_choice(scores_TE, is_open_TE, capacity_E)
    assert torch.equal(is_chosen_TE, expected)
    assert torch.equal(lowest_E, scores_TE.masked_fill(~expected, torch.inf).amin(0))


@pytest.mark.parametrize("mode", ["batch", "batch_leaky", "threshold", "aux"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_the_other_modality_are_never_chosen(layout, mode):
    ids, hidden = random_batch()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    router = choice_router(layout, with_auxiliary=True)
    torch.nn.init.normal_(router.auxiliary.inner)
    torch.nn.init.normal_(router.auxiliary.outer)
    choice = choose(router, ids, hidden, mode, mask)
    is_allowed_TE = LAYOUTS[layout].allowed_PX.expand(2, -1)[(ids >= IMAGE).long().flatten()]
    assert choice.is_chosen_TE.any()
    assert not choice.is_chosen_TE[~is_allowed_TE].any()
    assert not choice.is_chosen_TE[mask.flatten() == 0].any()


def test_an_empty_modality_is_chosen_nothing_of_and_leaves_its_thresholds_alone():
    router = choice_router("split")
    text = torch.zeros(2, 6, dtype=torch.long)
    choice = choose(router, text, torch.randn(12, WIDTH))
    assert choice.is_chosen_TE.sum(0).tolist() == [3, 3, 3, 3, 0, 0, 0]
    router.track(choice.cutoff_E)
    assert router.threshold[4:].tolist() == [0.5] * 3
    assert not (router.threshold[:4] == 0.5).any()


def test_a_batch_of_padding_alone_is_chosen_nothing_of():
    ids, hidden = random_batch()
    choice = choose(choice_router("mixed"), ids, hidden, mask=torch.zeros_like(ids))
    assert not choice.is_chosen_TE.any()
    assert choice.cutoff_E.isinf().all()


@pytest.mark.parametrize("mode", ["batch", "threshold", "aux"])
def test_a_lone_expert_takes_every_token_of_its_modality_with_weight_one(mode):
    ids, hidden = random_batch()
    router = choice_router("lone", with_auxiliary=True)
    torch.nn.init.zeros_(router.auxiliary.inner)
    torch.nn.init.zeros_(router.auxiliary.outer)
    weights_TE = choose(router, ids, hidden, mode).routing().weights_TE
    assert torch.equal(weights_TE[:, 3], (ids >= IMAGE).flatten().float())


def test_a_layers_depth_router_is_not_taken_for_a_lone_expert():
    ids, hidden = random_batch()
    choice = choose(choice_router("one", share=0.25), ids, hidden)
    assert choice.is_chosen_TE.sum() == 6


def test_the_routing_weighs_picks_by_their_sigmoid_scores_without_renormalising():
    ids, hidden = random_batch()
    router = choice_router("split")
    choice = choose(router, ids, hidden)
    expected = (hidden @ router.weight.T).sigmoid() * choice.is_chosen_TE
    torch.testing.assert_close(choice.routing().weights_TE, expected)


def test_the_cutoff_is_the_lowest_score_chosen_and_that_without_noise():
    ids, hidden = random_batch()
    router, noisy = choice_router("mixed"), choice_router("mixed", noise=1.0)
    noisy.load_state_dict(router.state_dict())
    choice = choose(router, ids, hidden)
    assert torch.equal(choose(noisy, ids, hidden).cutoff_E, choice.cutoff_E)
    for e in range(8):
        assert choice.cutoff_E[e] == choice.scores_TE[choice.is_chosen_TE[:, e], e].min()


def test_thresholds_are_the_mean_of_cutoffs_at_first_and_then_a_running_mean():
    router = choice_router("one", share=0.5, momentum=0.8)
    seen = [0.1, 0.3, 0.8, 0.2, 0.6, 0.4]
    for cutoff in seen:
        router.track(torch.tensor([cutoff]))
    expected = sum(seen[:5]) / 5 * 0.8 + 0.4 * 0.2
    torch.testing.assert_close(router.threshold, torch.tensor([expected]))


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_calibrated_thresholds_choose_about_as_much_as_the_batch_would(noise):
    router = choice_router("split", noise=noise)
    for _ in range(60):
        router.track(choose(router, *random_batch(4, 32)).cutoff_E)
    picks = tokens = 0
    for _ in range(20):
        ids, hidden = random_batch(4, 32)
        picks += choose(router.eval(), ids, hidden, "threshold").is_chosen_TE.sum()
        tokens += ids.numel()
    assert abs(picks / tokens - 1) < 0.05  # worst of ten seeds: 0.02


def test_noise_moves_the_choice_in_training_only_and_not_once_the_router_is_frozen():
    ids, hidden = random_batch()
    router, quiet = choice_router(noise=1.0), choice_router()
    quiet.load_state_dict(router.state_dict())
    expected = choose(quiet, ids, hidden).scores_TE
    assert not torch.equal(choose(router, ids, hidden).scores_TE, expected)
    assert torch.equal(choose(router.eval(), ids, hidden).scores_TE, expected)
    assert torch.equal(choose(router.train().requires_grad_(False), ids, hidden).scores_TE, expected)


def test_noise_is_a_difference_of_two_gumbel_variables():
    router = choice_router("mixed", noise=2.0)
    ids, hidden = torch.zeros(1, 4000, dtype=torch.long), torch.zeros(4000, WIDTH)
    noise = choose(router, ids, hidden).logits_TE.detach() / 2
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.var()) / (torch.pi**2 / 3) - 1) < 0.05  # the variance of a logistic variable


def test_an_auxiliary_router_is_silu_between_two_maps_its_inner_one_for_each_group():
    router = AuxiliaryRouter(WIDTH, [2, 3])
    torch.nn.init.normal_(router.inner)
    torch.nn.init.normal_(router.outer)
    hidden = torch.randn(4, WIDTH)
    text = torch.nn.functional.silu(hidden @ router.inner[0].T) @ router.outer[:2].T
    image = torch.nn.functional.silu(hidden @ router.inner[1].T) @ router.outer[2:].T
    torch.testing.assert_close(router(hidden), torch.cat([text, image], 1))


def test_auxiliary_routers_learn_what_the_batch_chooses_and_teach_the_model_nothing():
    router = choice_router("split", with_auxiliary=True)
    torch.nn.init.normal_(router.auxiliary.inner, std=0.3)
    torch.nn.init.normal_(router.auxiliary.outer, std=0.3)
    router.requires_grad_(False).auxiliary.requires_grad_(True)
    optimizer = torch.optim.AdamW(router.auxiliary.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        ids, hidden = random_batch(4, 32)
        hidden.requires_grad_()
        loss = auxiliary_loss([choose(router, ids, hidden)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert hidden.grad is None
    assert losses[-1] < 0.7 * losses[0]
    ids, hidden = random_batch(8, 32)
    batch, causal = choose(router, ids, hidden), choose(router, ids, hidden, "aux")
    is_right_TE = batch.is_chosen_TE == causal.is_chosen_TE
    assert is_right_TE[batch.is_open_TE].float().mean() > 0.8


def test_padding_does_not_count_in_the_auxiliary_loss():
    ids, hidden = random_batch()
    router = choice_router("mixed", with_auxiliary=True)
    torch.nn.init.normal_(router.auxiliary.inner)
    torch.nn.init.normal_(router.auxiliary.outer)
    router.auxiliary.requires_grad_(True)
    mask = torch.ones_like(ids)
    mask[1:] = 0
    joined = auxiliary_loss([choose(router, ids, hidden, mask=mask)])
    alone = auxiliary_loss([choose(router, ids[:1], hidden[: ids.shape[1]])])
    torch.testing.assert_close(joined, alone)


def test_moved_to_bfloat16_the_router_and_its_thresholds_keep_fp32():
    router = choice_router(with_auxiliary=True).to(torch.bfloat16)
    dtypes = {tensor.dtype for tensor in router.state_dict().values()}
    assert dtypes == {torch.float32}
