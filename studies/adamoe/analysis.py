"""From runs to statements: distance at equal load, intervals over paired seeds, whether experts follow difficulty.

S seeds, P points of a curve, N tokens, L routed layers. Everything is a pure function of numbers.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from mllm.evaluation import significance
from mllm.evaluation.seeds import Estimate, estimate

__all__ = ["Estimate", "correlation", "estimate", "experts_over_layers", "holm", "loss_at_load"]


def loss_at_load(loads_P: Sequence[float], losses_P: Sequence[float], load: float) -> float:
    """A curve's loss at a load between its points, on straight lines; NaN outside, where it would be a guess."""
    order_P = np.argsort(loads_P)
    return float(np.interp(load, np.take(loads_P, order_P), np.take(losses_P, order_P), left=np.nan, right=np.nan))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's adjustment for one family of tests by name; NaN stays NaN and is not counted."""
    tested = {name: p for name, p in p_values.items() if not np.isnan(p)}
    return dict.fromkeys(p_values, np.nan) | dict(zip(tested, significance.holm(list(tested.values())), strict=True))


def correlation(values_N: np.ndarray, others_N: np.ndarray, position_N: np.ndarray) -> float:
    """Spearman's, with the mean of each position taken off both; NaN where nothing is left to vary.

    Positions at which either does not vary (the last token of a prompt is always the same) tell nothing and are left
    out: their zeros would only dilute.
    """
    _, cell_N = np.unique(position_N, return_inverse=True)
    left_N = _off_mean(values_N, cell_N), _off_mean(others_N, cell_N)
    varies_N = np.logical_and(*(np.bincount(cell_N, each_N**2)[cell_N] > 1e-9 for each_N in left_N))
    if varies_N.sum() < 3:
        return np.nan
    return float(stats.spearmanr(*(each_N[varies_N] for each_N in left_N)).statistic)


def _off_mean(values_N: np.ndarray, cell_N: np.ndarray) -> np.ndarray:
    values_N = values_N.astype(np.float64)
    return values_N - (np.bincount(cell_N, values_N) / np.bincount(cell_N))[cell_N]


def experts_over_layers(real_picks_NL: np.ndarray) -> np.ndarray:
    """[N] how many more real experts than its layers' mean a token takes, summed over layers."""
    real_picks_NL = real_picks_NL.astype(np.float64)
    return (real_picks_NL - real_picks_NL.mean(0)).sum(1)
