"""From runs to statements: distance at equal load, intervals over paired seeds, whether experts follow difficulty.

S seeds, P points of a curve, N tokens, L routed layers. Everything is a pure function of numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

POWER = 0.8


def loss_at_load(loads_P: Sequence[float], losses_P: Sequence[float], load: float) -> float:
    """A curve's loss at a load between its points, on straight lines; NaN outside, where it would be a guess."""
    order_P = np.argsort(loads_P)
    return float(np.interp(load, np.take(loads_P, order_P), np.take(losses_P, order_P), left=np.nan, right=np.nan))


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds of paired values, its 95 % t-interval and p-value, and what could have been seen.

    `detectable` is the smallest true mean that so many seeds with this scatter find four times in five, two-sided at
    5 %. All are NaN but n and mean below two seeds.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    detectable: float


def estimate(values_S: Sequence[float]) -> Estimate:
    """Of the values that are not NaN; seeds whose load could not be compared drop out."""
    values_S = np.asarray(values_S, dtype=np.float64)
    values_S = values_S[~np.isnan(values_S)]
    n = len(values_S)
    mean = float(values_S.mean()) if n else np.nan
    if n < 2 or np.ptp(values_S) == 0:
        return Estimate(n, mean, np.nan, np.nan, np.nan, np.nan)
    test = stats.ttest_1samp(values_S, 0.0)
    low, high = test.confidence_interval(0.95)
    quantiles = stats.t.ppf(0.975, n - 1) + stats.t.ppf(POWER, n - 1)
    detectable = quantiles * stats.sem(values_S)
    return Estimate(n, mean, float(low), float(high), float(test.pvalue), float(detectable))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's adjustment (1979) for one family of tests; NaN stays NaN and is not counted."""
    tested = sorted((p, name) for name, p in p_values.items() if not np.isnan(p))
    steps = [min(1.0, (len(tested) - rank) * p) for rank, (p, _) in enumerate(tested)]
    adjusted = dict(zip((name for _, name in tested), np.maximum.accumulate(steps or [0.0]).tolist(), strict=False))
    return {name: adjusted.get(name, np.nan) for name in p_values}


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
