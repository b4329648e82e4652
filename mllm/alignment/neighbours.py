"""Which samples are neighbours of which, and how much each counts (RoMA, 2511.07419): exact search, by chunks.

N samples, M width of an embedding, C candidates, K neighbours of a sample, Q queries of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.common.errors import UserError

CHUNK = 1024
LARGE = 200_000  # candidates from which "auto" takes faiss, where it is installed
INDEXES = ("auto", "torch", "faiss")


@dataclass(frozen=True)
class Neighbours:
    """Of each sample: `ids_NK` (int64, -1 where there is none), squared distances, and weights that sum to 1, or to 0
    for a sample without neighbours."""

    ids_NK: Tensor
    squared_NK: Tensor
    weights_NK: Tensor

    @property
    def has_some_N(self) -> Tensor:
        """bool [N]."""
        return (self.ids_NK >= 0).any(1)

    def shuffled(self, candidates_N: Tensor, generator: torch.Generator) -> Neighbours:
        """The control: neighbours drawn at random from the candidates, with the very weights of the true ones.

        Never the sample itself, and none twice in a row.
        """
        pool_C = candidates_N.nonzero().flatten()
        if len(pool_C) <= self.ids_NK.shape[1]:
            raise UserError(f"{len(pool_C)} candidates are too few to draw {self.ids_NK.shape[1]} others from.")
        ids_NK = torch.full_like(self.ids_NK, -1)
        for sample, true_K in enumerate(self.ids_NK):
            drawn_C = pool_C[torch.randperm(len(pool_C), generator=generator)]
            others_K = drawn_C[drawn_C != sample][: len(true_K)]
            ids_NK[sample] = torch.where(true_K >= 0, others_K, -1)
        return Neighbours(ids_NK, torch.full_like(self.squared_NK, torch.nan), self.weights_NK)


def nearest(
    embeddings_NM: Tensor,
    *,
    queries_QM: Tensor | None = None,
    candidates_N: Tensor | None = None,
    k: int = 3,
    radius: float | None = None,
    sigma: float | None = None,
    groups_N: Tensor | None = None,
    index: str = "auto",
) -> Neighbours:
    """The k nearest candidates of every sample; a sample is never its own neighbour.

    W_ij = exp(-‖E_i - E_j‖² / 2σ²), divided by its sum over the neighbours of i.

    Args:
        embeddings_NM: of unit length, so that a squared distance is 2 - 2 cos.
        queries_QM: look for the neighbours of these instead, samples of their own; N is then their number.
        candidates_N: bool, who may be a neighbour: the successful training samples. None: everybody.
        k: how many; with `radius`, at most so many.
        radius: ε: only those at most so far away (a distance, not its square).
        sigma: σ; None: the median distance of the farthest neighbour taken, so that weights differ but none vanishes.
        groups_N: samples of the same group are no neighbours, such as questions on one picture.
        index: "torch", exact; "faiss", an approximate graph index (HNSW) of that library, not with groups; "auto":
            faiss above 200 000 candidates where it is installed.

    Raises:
        UserError: no candidate, or values that cannot be.
    """
    if k < 1 or index not in INDEXES or (radius is not None and radius <= 0) or (sigma is not None and sigma <= 0):
        raise UserError(
            f"k={k}, radius={radius}, sigma={sigma} must be positive, and index={index!r} one of {', '.join(INDEXES)}."
        )
    if candidates_N is None:
        candidates_N = torch.ones(len(embeddings_NM), dtype=torch.bool)
    pool_C = candidates_N.nonzero().flatten()
    if not len(pool_C):
        raise UserError("No sample can be a neighbour: none of the candidates was answered correctly.")
    owner_Q = torch.arange(len(embeddings_NM)) if queries_QM is None else torch.full((len(queries_QM),), -1)
    queries_QM = embeddings_NM if queries_QM is None else queries_QM
    if _with_faiss(index, len(pool_C)) and groups_N is None:
        ids_NK, squared_NK = _faiss_search(queries_QM, owner_Q, embeddings_NM, pool_C, k)
    else:
        found = [
            _search(queries_QM[start : start + CHUNK], owner_Q[start : start + CHUNK], embeddings_NM, pool_C, k,
                    groups_N)
            for start in range(0, len(queries_QM), CHUNK)
        ]  # fmt: skip
        ids_NK, squared_NK = (torch.cat(parts) for parts in zip(*found, strict=True))
    if radius is not None:
        ids_NK = ids_NK.masked_fill(squared_NK > radius**2, -1)
    squared_NK = squared_NK.masked_fill(ids_NK < 0, torch.inf)
    return Neighbours(ids_NK, squared_NK, _weights(squared_NK, sigma))


def _search(
    queries_QM: Tensor, owner_Q: Tensor, embeddings_NM: Tensor, pool_C: Tensor, k: int, groups_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    # of equal distances topk takes any: (a - b)² summed is 0 for equal embeddings, which 2 - 2 cos is not quite
    squared_QC = torch.cdist(queries_QM.float(), embeddings_NM[pool_C].float()).square()
    forbidden_QC = owner_Q[:, None] == pool_C
    if groups_N is not None:
        is_sample_Q1 = (owner_Q >= 0)[:, None]
        forbidden_QC = forbidden_QC | (is_sample_Q1 & (groups_N[owner_Q][:, None] == groups_N[pool_C]))
    squared_QC = squared_QC.masked_fill(forbidden_QC, torch.inf)
    squared_QK, places_QK = squared_QC.topk(min(k, len(pool_C)), largest=False)
    return pool_C[places_QK].masked_fill(squared_QK.isinf(), -1), squared_QK


def _weights(squared_NK: Tensor, sigma: float | None) -> Tensor:
    is_there_NK = squared_NK.isfinite()
    if sigma is None:
        farthest_N = squared_NK.masked_fill(~is_there_NK, 0).max(1).values[is_there_NK.any(1)]
        sigma = farthest_N.sqrt().median().item() if len(farthest_N) else 1.0
    logits_NK = (-squared_NK / (2 * max(sigma, 1e-6) ** 2)).masked_fill(~is_there_NK, -torch.inf)
    weights_NK = logits_NK.softmax(1)  # the quotient of exponentials, without their underflow
    return weights_NK.masked_fill(~is_there_NK, 0)


def _with_faiss(index: str, candidates: int) -> bool:
    if index == "torch" or (index == "auto" and candidates < LARGE):
        return False
    try:
        import faiss  # noqa: F401
    except ImportError:
        if index == "faiss":
            raise UserError('index="faiss" needs the package faiss-cpu (or faiss-gpu); install it.') from None
        return False
    return True


def _faiss_search(
    queries_QM: Tensor, owner_Q: Tensor, embeddings_NM: Tensor, pool_C: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    import faiss

    graph = faiss.IndexHNSWFlat(embeddings_NM.shape[1], 32)
    graph.add(embeddings_NM[pool_C].float().contiguous().numpy())
    squared, places = graph.search(queries_QM.float().contiguous().numpy(), min(k + 1, len(pool_C)))
    squared_QK, places_QK = torch.from_numpy(squared), torch.from_numpy(places)
    ids_QK = pool_C[places_QK.clamp(min=0)].masked_fill(places_QK < 0, -1)
    squared_QK = squared_QK.masked_fill((ids_QK < 0) | (ids_QK == owner_Q[:, None]), torch.inf)
    squared_QK, order_QK = squared_QK.topk(min(k, len(pool_C)), largest=False)  # one more was asked for: itself
    return ids_QK.gather(1, order_QK).masked_fill(squared_QK.isinf(), -1), squared_QK
