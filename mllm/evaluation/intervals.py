"""How sure a mean score is: bootstrap over pictures, since questions on one picture stand and fall together.

n rows, C pictures (clusters), Q distinct kinds of cluster, M resamples.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
_CELLS_AT_ONCE = 20_000_000  # of the (M, Q) count matrix: 160 MB


def bootstrap_means(scores: Sequence[float], clusters: Sequence[str], *, rng: np.random.Generator) -> np.ndarray:
    """Means of `RESAMPLES` data sets, each of as many pictures as there are, drawn with replacement: (M,).

    Pictures with the same total and the same number of rows are interchangeable, so instead of drawing C indices a
    resample draws how often each of the Q kinds occurs, from the multinomial that those counts follow. Same
    distribution, and right and wrong answers have few kinds. Cluster bootstrap: Cameron, Gelbach & Miller 2008.
    """
    _, cluster_of_row = np.unique(np.asarray(clusters), return_inverse=True)
    totals_C = np.bincount(cluster_of_row, weights=np.asarray(scores, dtype=np.float64))
    sizes_C = np.bincount(cluster_of_row)
    kinds_Q2, counts_Q = np.unique(np.stack([totals_C, sizes_C], axis=1), axis=0, return_counts=True)
    num_clusters = len(sizes_C)

    means = []
    chunk = max(1, _CELLS_AT_ONCE // len(counts_Q))
    for start in range(0, RESAMPLES, chunk):
        drawn_MQ = rng.multinomial(num_clusters, counts_Q / num_clusters, size=min(chunk, RESAMPLES - start))
        totals_M, rows_M = (drawn_MQ @ kinds_Q2).T
        means.append(totals_M / rows_M)
    return np.concatenate(means)


def interval(means_M: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrapped means."""
    low, high = np.percentile(means_M, [2.5, 97.5])
    return float(low), float(high)
