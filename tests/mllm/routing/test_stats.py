import json
import math

import pytest
import torch

from mllm.errors import UserError
from mllm.routing import RoutingContext, RoutingStats, route

IMAGE = 9
IDS = torch.tensor([[IMAGE, 1, 2], [IMAGE, IMAGE, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
PICKS = [0, 1, 1, 0, 0, 2]  # the last token is padding


def context(picks=PICKS, layers=("a",), sharp=100.0):
    made = RoutingContext(IMAGE)
    made.begin(input_ids=IDS, attention_mask=MASK)
    for layer in layers:
        logits = torch.nn.functional.one_hot(torch.tensor(picks), 3).float() * sharp
        made.record(layer, route(logits, top_k=1, gate="none"), trainable=False)
    return made


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
    made.is_image_T = None
    with pytest.raises(UserError, match="input_ids"):
        RoutingStats().update(made)
