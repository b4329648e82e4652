"""Neighbours are the nearest others that may be one."""

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mllm.alignment import nearest
from mllm.common.errors import UserError


def points(number: int = 40, width: int = 5, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(number, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_nearest_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr("mllm.alignment.neighbours.CHUNK", 7)
    embeddings = points()
    found = nearest(embeddings, k=4)
    for sample in range(40):
        squared = (embeddings - embeddings[sample]).square().sum(1)
        squared[sample] = torch.inf
        assert found.ids_NK[sample].tolist() == squared.argsort()[:4].tolist()


@pytest.mark.parametrize("embeddings", [points(), torch.ones(40, 5) / 5**0.5], ids=["apart", "all the same"])
def test_a_sample_is_never_its_own_neighbour(embeddings):
    found = nearest(embeddings, k=3)
    assert (found.ids_NK != torch.arange(40)[:, None]).all()
    assert (found.ids_NK >= 0).all()
    shuffled = found.shuffled(torch.ones(40, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert (shuffled.ids_NK != torch.arange(40)[:, None]).all()


def test_only_candidates_are_neighbours_and_those_who_are_none_have_some():
    candidates = torch.arange(40) % 3 == 0
    found = nearest(points(), candidates_N=candidates, k=5)
    assert candidates[found.ids_NK].all()
    assert found.has_some_N.all()


def test_weights_are_the_gaussian_kernels_and_sum_to_one():
    found = nearest(points(), k=3, sigma=0.4)
    kernel = torch.exp(-found.squared_NK / (2 * 0.4**2))
    torch.testing.assert_close(found.weights_NK, kernel / kernel.sum(1, keepdim=True))


def test_without_sigma_weights_differ_and_none_vanishes():
    weights = nearest(points(), k=3).weights_NK
    assert weights.min() > 0.1
    assert (weights[:, 0] > weights[:, 2]).all()


def test_a_ball_takes_fewer_where_it_is_empty():
    found = nearest(points(), k=40, radius=0.8)
    inside = torch.cdist(points(), points()) <= 0.8
    assert torch.equal((found.ids_NK >= 0).sum(1), inside.sum(1) - 1)
    sums = found.weights_NK.sum(1)
    torch.testing.assert_close(sums, found.has_some_N.float())


def test_samples_of_one_group_are_no_neighbours():
    groups = torch.arange(40) // 4
    found = nearest(points(), k=6, groups_N=groups)
    assert (groups[found.ids_NK] != groups[:, None]).all()


def test_new_questions_look_among_the_samples_only():
    embeddings = points()
    found = nearest(embeddings, queries_QM=embeddings[:3], k=1)
    assert found.ids_NK.flatten().tolist() == [0, 1, 2]  # they are no samples, so nobody is excluded


def test_random_neighbours_have_the_weights_of_the_true_ones_and_no_order():
    candidates = torch.arange(40) % 2 == 0
    found = nearest(points(), candidates_N=candidates, k=3)
    shuffled = found.shuffled(candidates, torch.Generator().manual_seed(1))
    assert torch.equal(shuffled.weights_NK, found.weights_NK)
    assert candidates[shuffled.ids_NK].all()
    assert all(len(set(row)) == 3 for row in shuffled.ids_NK.tolist())
    assert (shuffled.ids_NK == found.ids_NK).float().mean() < 0.4


def test_wrong_values_are_refused():
    with pytest.raises(UserError, match="answered correctly"):
        nearest(points(), candidates_N=torch.zeros(40, dtype=torch.bool))
    for wrong in ({"k": 0}, {"radius": -1}, {"sigma": 0}, {"index": "annoy"}):
        with pytest.raises(UserError, match="must be positive"):
            nearest(points(), **wrong)
    with pytest.raises(UserError, match="too few"):
        nearest(points(4), k=3).shuffled(torch.tensor([True, True, False, False]), torch.Generator())


def test_faiss_is_asked_for_by_name_and_told_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="faiss-cpu"):
        nearest(points(), index="faiss")
    assert nearest(points(), index="auto").has_some_N.all()


class ExactIndex:
    """Stands for faiss's index: the same calls, exact."""

    def __init__(self, width, links):
        self.width = width

    def add(self, rows):
        assert rows.shape[1] == self.width
        self.rows = rows

    def search(self, queries, k):
        squared = ((queries[:, None] - self.rows) ** 2).sum(-1)
        places = squared.argsort(1)[:, :k]
        return np.take_along_axis(squared, places, 1), places


def test_faiss_gives_what_exact_search_gives(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", types.SimpleNamespace(IndexHNSWFlat=ExactIndex))
    candidates = torch.arange(40) % 4 != 0
    one, other = (nearest(points(), candidates_N=candidates, k=3, index=index) for index in ("faiss", "torch"))
    assert torch.equal(one.ids_NK, other.ids_NK)
    torch.testing.assert_close(one.weights_NK, other.weights_NK)
