import json
import math

import pytest
import torch

from mllm.common.errors import UserError
from mllm.routing import RoutingContext, RoutingStats, route
from mllm.routing.stats import mutual_information

IMAGE = 9
IDS = torch.tensor([[IMAGE, 1, 2], [IMAGE, IMAGE, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
PICKS = [0, 1, 1, 0, 0, 2]  # the last token is padding


def context(picks=PICKS, layers=("a",), sharp=100.0, num_experts=3, **options):
    """`picks` of 3 experts are each token's first choice; experts from num_experts on are null."""
    made = RoutingContext(IMAGE)
    made.begin(input_ids=IDS, attention_mask=MASK)
    for layer in layers:
        logits = torch.nn.functional.one_hot(torch.tensor(picks), 3).float() * sharp
        routing = route(logits, **({"top_k": 1, "gate": "none", "num_experts": num_experts} | options))
        made.record(layer, routing, trainable=False)
    return made


def stats_of(*args, domains=("general", "document"), **options):
    stats = RoutingStats()
    stats.update(context(*args, **options), domains)
    return stats


def test_shares_are_counted_per_domain_without_padding():
    stats = RoutingStats()
    stats.update(context(), ["general", "document"])
    assert stats.shares() == {
        "document": {"a": [1.0, 0.0, 0.0]},
        "general": {"a": [pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0]},
    }


def test_updates_add_up_as_one_larger_batch_would():
    twice, once = RoutingStats(), RoutingStats()
    twice.update(context(), ["general", "general"])
    twice.update(context([2] * 6), ["document", "general"])
    once.update(context(), ["general", "general"])
    other = RoutingStats()
    other.update(context([2] * 6), ["document", "general"])
    assert twice.to_json() == once.merge(other).to_json() == once.merge(other).all_reduce().to_json()
    assert once.to_json() != twice.to_json()


def test_tokens_picks_probabilities_and_entropy_are_kept_per_modality():
    stats = RoutingStats()
    stats.update(context(sharp=0.0), ["general", "document"])
    cells = stats.to_json()["domains"]["general"]
    assert (cells["text"]["tokens"], cells["image"]["tokens"]) == (2, 1)
    assert cells["text"]["entropy"] == [pytest.approx(math.log(3))]
    assert cells["image"]["mean_probs"][0] == [pytest.approx(1 / 3)] * 3


def test_modality_shares_pool_all_domains():
    stats = RoutingStats()
    stats.update(context(), ["general", "document"])
    assert stats.to_json()["modality_shares"] == {"text": {"a": [0.0, 1.0, 0.0]}, "image": {"a": [1.0, 0.0, 0.0]}}


def test_the_summary_holds_entropy_load_busiest_share_and_dead_experts_by_layer_and_overall():
    stats = RoutingStats()
    stats.update(context(layers=("a", "b")))
    summary = stats.summary()
    assert summary["routing/entropy/a"] == pytest.approx(0, abs=1e-6)
    assert summary["routing/load/b"] == 1
    assert summary["routing/max_share/a"] == pytest.approx(3 / 5)
    assert (summary["routing/dead_experts/a"], summary["routing/dead_experts"]) == (1, 2)
    assert all(isinstance(value, float) for value in summary.values())


def test_everything_is_plain_json_and_nothing_is_nothing():
    stats = RoutingStats()
    assert stats.summary() == {}
    assert stats.shares() == {}
    stats.update(RoutingContext())
    assert json.loads(json.dumps(stats.to_json()))["layers"] == []
    stats.update(context())
    assert json.loads(json.dumps(stats.to_json())) == stats.to_json()
    assert list(stats.shares()) == ["all"]


def test_domains_that_do_not_match_the_rows_are_refused():
    with pytest.raises(UserError, match="1 domains for a batch of 2 rows"):
        RoutingStats().update(context(), ["general"])


def test_statistics_of_two_models_are_not_mixed():
    stats = RoutingStats()
    stats.update(context())
    with pytest.raises(UserError, match="one RoutingStats a model"):
        stats.update(context(layers=("b",)))


def test_tokens_of_unknown_modality_are_refused():
    made = context()
    made.tokens.is_image_T = None
    with pytest.raises(UserError, match="input_ids"):
        RoutingStats().update(made)


# Counted tokens are image, text, text, image, image: three of the first row, two of the second.
NULL = 2


def test_load_and_null_share_count_real_and_null_picks_and_are_told_by_modality_and_domain():
    summary = stats_of([0, NULL, 1, NULL, NULL, 0], num_experts=2).summary()
    assert summary["routing/load"] == pytest.approx(2 / 5)
    assert summary["routing/null_share"] == summary["routing/null_share/a"] == pytest.approx(3 / 5)
    assert summary["routing/null_share/text"] == pytest.approx(1 / 2)
    assert summary["routing/null_share/image"] == pytest.approx(2 / 3)
    assert summary["routing/null_share/domain/document"] == 1
    assert summary["routing/load/domain/general"] == pytest.approx(2 / 3)


def test_empty_slots_are_neither_load_nor_null_picks():
    stats = stats_of(sharp=1.0, top_k=2, top_p=0.1, num_experts=2)  # the second slot stays empty
    assert stats.summary()["routing/load"] == 1
    assert stats.summary()["routing/null_share"] == 0
    stats = stats_of(drop_share=1 - 1e-7)
    assert (stats.summary()["routing/load"], stats.summary()["routing/empty_share"]) == (0, 1)


def test_the_number_of_real_experts_a_token_gets_is_kept_as_a_distribution():
    stats = stats_of([0, 0, NULL, NULL, NULL, 0], sharp=9.0, top_k=1, num_experts=2)
    cells = stats.to_json()["domains"]
    assert cells["general"]["text"]["real_picks"] == [[1, 1]]
    assert cells["document"]["image"]["real_picks"] == [[2, 0]]
    summary = stats.summary()
    assert summary["routing/empty_share"] == pytest.approx(3 / 5)
    assert summary["routing/load_variance"] == pytest.approx(2 / 5 * 3 / 5)


def test_shares_hold_real_experts_and_all_null_experts_as_one_last_column():
    stats = stats_of([0, 1, NULL, 1, NULL, 0], num_experts=1)
    assert stats.to_json()["experts"] == ["0", "null"]
    assert stats.shares()["general"] == {"a": [pytest.approx(1 / 3), pytest.approx(2 / 3)]}
    assert stats.to_json()["domains"]["general"]["text"]["picks"] == [[0, 1, 1]]


def test_entropy_and_busiest_share_look_at_real_experts_only():
    summary = stats_of([NULL] * 4 + [0, 0], sharp=5.0, num_experts=2).summary()
    # four tokens waver between both real experts, the fifth prefers one by e^5
    sure = 1 / (1 + math.exp(-5))
    one = -sure * math.log(sure) - (1 - sure) * math.log(1 - sure)
    assert summary["routing/entropy"] == pytest.approx((4 * math.log(2) + one) / 5, rel=1e-5)
    assert summary["routing/max_share"] == 1


def test_an_expert_that_no_token_was_free_to_take_is_not_dead():
    free = torch.tensor([[True, True, False]]).repeat(6, 1)
    summary = stats_of([0] * 6, allowed_TX=free).summary()
    assert summary["routing/dead_experts"] == 1
    assert stats_of([0] * 6).summary()["routing/dead_experts"] == 2


def test_picks_that_follow_the_domain_tell_all_of_it_and_even_picks_tell_nothing():
    told = stats_of([0, 0, 0, 1, 1, 1]).summary()
    entropy = -(3 / 5 * math.log(3 / 5) + 2 / 5 * math.log(2 / 5))
    assert told["routing/mi_domain"] == told["routing/mi_domain/a"] == pytest.approx(entropy)
    assert told["routing/mi_domain_ratio"] == pytest.approx(1)
    even = stats_of([0] * 6).summary()
    assert even["routing/mi_domain"] == even["routing/mi_modality"] == even["routing/mi_domain_ratio"] == 0


def test_mutual_information_with_the_modality_counts_null_picks_as_one_expert():
    summary = stats_of([NULL, 0, 0, NULL, 1, 0], num_experts=1).summary()  # 1 and 2 are null
    assert summary["routing/mi_modality"] == pytest.approx(-(2 / 5 * math.log(2 / 5) + 3 / 5 * math.log(3 / 5)))


def test_mutual_information_of_a_table_equals_its_definition():
    counts_LCO = torch.tensor([[[3.0, 1.0], [2.0, 6.0]]], dtype=torch.float64)
    joint = counts_LCO[0] / 12
    expected = (joint * (joint / (joint.sum(1, keepdim=True) * joint.sum(0))).log()).sum()
    assert mutual_information(counts_LCO) == pytest.approx(float(expected))


def test_with_a_single_domain_its_mutual_information_is_zero_and_it_is_not_told_apart():
    summary = stats_of(domains=None).summary()
    assert summary["routing/mi_domain"] == 0
    assert not [name for name in summary if "/domain/" in name]


def test_figures_by_domain_and_modality_are_in_json():
    figures = stats_of([0, NULL, 1, NULL, NULL, 0], num_experts=2).to_json()["figures"]
    assert figures["domain"]["document"]["null_share"] == 1
    assert figures["modality"]["image"]["load"] == pytest.approx(1 / 3)
    assert figures["modality"]["text"]["dead_experts"] == 1
