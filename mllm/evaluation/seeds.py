"""How sure a mean over paired seeds is, taking nothing but the seeds into account.

S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

POWER = 0.8


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
    """Of the values that are not NaN; a seed that could not be compared drops out."""
    values_S = np.asarray(values_S, dtype=np.float64)
    values_S = values_S[~np.isnan(values_S)]
    n = len(values_S)
    mean = float(values_S.mean()) if n else np.nan
    if n < 2 or np.ptp(values_S) < 1e-12:  # equal but for rounding
        return Estimate(n, mean, np.nan, np.nan, np.nan, np.nan)
    test = stats.ttest_1samp(values_S, 0.0)
    low, high = test.confidence_interval(0.95)
    quantiles = stats.t.ppf(0.975, n - 1) + stats.t.ppf(POWER, n - 1)
    detectable = quantiles * stats.sem(values_S)
    return Estimate(n, mean, float(low), float(high), float(test.pvalue), float(detectable))
