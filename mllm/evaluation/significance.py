"""Whether two models differ: tests over paired answers, and Holm's correction for asking about several domains.

M resamples.
"""

from collections.abc import Sequence

import numpy as np


def bootstrap_p(differences_M: np.ndarray) -> float:
    """Two-sided p value of bootstrapped mean differences: twice the smaller share on one side of zero.

    It is the level at which the percentile interval just reaches zero. One is added above and below, so that the
    smallest p that M resamples can give is 2 / (M + 1), never 0: Davison & Hinkley 1997, section 4.2.
    """
    sides = (differences_M <= 0).sum(), (differences_M >= 0).sum()
    return min(1.0, 2 * (1 + int(min(sides))) / (len(differences_M) + 1))


def mcnemar_p(first_only: int, second_only: int) -> float:
    """Exact two-sided McNemar test (1947) of the rows that one model has right and the other wrong: a fair coin?

    Of graded scores, count the rows where either is higher; the test is then the sign test.
    """
    discordant = first_only + second_only
    tail = ways = 1  # to choose 0 of the discordant rows, then 1, 2 …; whole numbers, so exact for any count
    for count in range(min(first_only, second_only)):
        ways = ways * (discordant - count) // (count + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << discordant))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, in the order given: Holm 1979.

    The smallest is multiplied by their number, the next by one less, and none comes out below one before it.
    """
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
