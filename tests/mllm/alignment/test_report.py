"""The report measures what it says."""

import pytest
import torch

from mllm.alignment import nearest
from mllm.alignment.report import alignment_tables, consistency, draw_routing, moved_layers, project
from mllm.alignment.report import shares_with_intervals as shares

TWO_TASKS = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(20, 1)  # routing follows the task exactly
EMBEDDINGS = TWO_TASKS + 0.01 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0))


def test_consistency_is_nothing_where_routing_follows_the_task_and_one_where_it_knows_nothing_of_it():
    neighbours = nearest(EMBEDDINGS, k=3)
    follows = consistency(TWO_TASKS, neighbours, range(40))
    assert follows["nearest"] == 0
    assert follows["random"] == pytest.approx(1.0, abs=0.3)  # half of the others are of the other task, 2 away
    knows_nothing = consistency(torch.rand(40, 8, generator=torch.Generator().manual_seed(1)), neighbours, range(40))
    assert knows_nothing["ratio"] == pytest.approx(1.0, abs=0.2)


def test_a_layer_that_did_not_move_is_told_from_one_that_did():
    before = torch.tensor([[0.9, 0.1, 0.5, 0.5]] * 4)
    after = torch.tensor([[0.2, 0.8, 0.5, 0.5]] * 4)
    initial = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}
    final = {"a.weight": torch.full((2, 2), 1.5), "b.weight": torch.ones(2, 2)}
    moved = moved_layers(before, after, [2, 2], ["a", "b"], initial, final)
    assert moved["a"] == pytest.approx({"weights_moved": 0.5, "routing_moved": 0.7, "other_pick": 1.0})
    assert moved["b"] == pytest.approx({"weights_moved": 0.0, "routing_moved": 0.0, "other_pick": 0.0})


def test_intervals_hold_the_share_and_are_no_wider_than_certain():
    figures = shares(torch.tensor([1, 1, 1, 1, 0, 1, 0, 1]).bool(), ["a"] * 4 + ["b"] * 4)
    assert figures["a"] == {"n": 4, "score": 1.0, "ci_low": 1.0, "ci_high": 1.0}
    assert figures["b"]["ci_low"] < 0.5 < figures["b"]["ci_high"]
    assert figures["all"]["score"] == 0.75


def test_the_plane_keeps_what_is_far_apart_and_the_picture_is_drawn(tmp_path):
    plane, method = project(TWO_TASKS)
    assert plane.shape == (40, 2)
    assert method in ("principal components", "t-SNE")
    assert (plane[0] - plane[1]).norm() > (plane[0] - plane[2]).norm()
    draw_routing(TWO_TASKS, 1 - TWO_TASKS, ["one", "two"] * 20, tmp_path / "routing.png")
    assert (tmp_path / "routing.png").stat().st_size > 5_000


def test_tables_name_the_weight_that_was_chosen():
    figures = {"nearest": 0.1, "random": 0.4, "ratio": 0.25}
    choice = [{"weight": 0.3, "loss": 1.0, "exact": 0.5, "chosen": False},
              {"weight": 3.0, "loss": 0.9, "exact": 0.5, "chosen": True}]  # fmt: skip
    report = {"consistency": {"before": figures, "after": figures}, "layers": {}, "choice": choice}
    *_, (_, _, rows) = alignment_tables(report)
    assert [row[0] for row in rows] == ["0.3", "3 *"]
