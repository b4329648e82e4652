"""What a person is warned of, and what not. Two rows of text and pictures, four experts."""

import pytest
import torch

from mllm.routing import RoutingContext, RoutingStats, route
from mllm.routing.watch import RoutingWatch

IMAGE = 9
IDS = torch.tensor([[1, 2, 3, 4, 5, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE]] * 2)
EVEN = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1] * 2


def stats_of(picks, ids=IDS, allowed_TX=None, sharp=9.0, **options):
    context = RoutingContext(IMAGE)
    context.begin(input_ids=ids)
    logits = torch.nn.functional.one_hot(torch.tensor(picks), 4).float() * sharp
    routing = route(logits, **({"top_k": 1, "gate": "none", "allowed_TX": allowed_TX} | options))
    context.record("layers.0.mlp", routing, trainable=False)
    stats = RoutingStats()
    stats.update(context)
    return stats


def warned(stats, norms=None, times=3):
    """All warnings of a watch that sees the same `times` intervals."""
    watch = RoutingWatch(steps=3)
    return [warning for step in range(times) for warning in watch.observe(step, stats, norms)]


def test_even_routing_and_empty_statistics_are_no_reason_to_warn():
    assert warned(stats_of(EVEN), {"layers.0.mlp": 0.3}) == []
    assert warned(RoutingStats()) == []


def test_a_trained_router_without_gradient_is_named():
    (warning,) = warned(stats_of(EVEN), {"layers.0.mlp": 0.0, "layers.1.mlp": 0.1})
    assert "layers.0.mlp" in warning
    assert "gradient has been zero" in warning


def test_experts_that_stay_without_tokens_are_named_with_their_layer():
    (warning,) = warned(stats_of([0, 1] * 10))
    assert warning.startswith("step 2: no token took expert 2, 3 of layers.0.mlp")


def test_a_fault_must_last_and_is_told_once():
    watch = RoutingWatch(steps=2)
    dead, even = stats_of([0, 1, 2] * 6 + [0, 1]), stats_of(EVEN)
    seen = [
        len(watch.observe(step, stats)) for step, stats in enumerate([dead, even, dead, dead, dead, even, dead, dead])
    ]
    assert seen == [0, 0, 0, 1, 0, 0, 0, 0]


GROUPS = torch.tensor([[expert < 2 for expert in range(4)]] * 5 + [[expert >= 2 for expert in range(4)]] * 5).repeat(
    2, 1
)


def test_without_pictures_an_image_expert_is_not_called_dead_and_its_count_waits():
    watch = RoutingWatch(steps=2)
    dead = stats_of([0, 1, 0, 1, 0] + [2] * 5 + [0, 1, 0, 1, 0] + [2] * 5, allowed_TX=GROUPS)
    text_only = stats_of([0, 1] * 5, ids=torch.ones(1, 10, dtype=torch.long), allowed_TX=GROUPS[:1].repeat(10, 1))
    assert watch.observe(0, dead) == watch.observe(1, text_only) == []
    assert any("expert 3" in warning for warning in watch.observe(2, dead))


def collapses(warnings):
    return [warning for warning in warnings if "same experts" in warning]


def test_collapse_is_told():
    (warning,) = collapses(warned(stats_of([0] * 20)))
    assert "text and image tokens took the same experts of layers.0.mlp" in warning


def test_a_split_by_modality_is_specialisation_and_no_collapse():
    assert collapses(warned(stats_of(([0] * 5 + [1] * 5) * 2))) == []


def test_collapse_inside_a_modality_group_is_told_of_that_modality():
    picks = ([0] * 5 + [2, 3, 2, 3, 2]) * 2
    (warning,) = collapses(warned(stats_of(picks, allowed_TX=GROUPS)))
    assert "nearly all text tokens" in warning


@pytest.mark.parametrize(("picks", "expected"), [([0] * 20, 1), (EVEN, 0)])
def test_with_two_picks_a_token_collapse_is_two_experts_taking_all(picks, expected):
    assert len(collapses(warned(stats_of(picks, top_k=2)))) == expected


def test_where_a_token_takes_all_experts_there_is_nothing_to_collapse():
    assert collapses(warned(stats_of([0] * 20, top_k=4))) == []


def test_tokens_that_take_null_experts_only_are_no_collapse():
    assert collapses(warned(stats_of([3] * 20, num_experts=3))) == []


def test_a_trained_router_that_is_certain_is_called_saturated_and_a_fixed_one_is_not():
    sure = stats_of(EVEN, sharp=50.0)
    (warning,) = warned(sure, {"layers.0.mlp": 1e-3})
    assert "certain about text and image tokens" in warning
    assert warned(sure) == []
