"""From scores to statements: conflict, recovery, differences, each with an interval over seeds and pictures together.

A arms, S paired seeds, N samples, C pictures (clusters), G groups (domains or sources), M resamples.
Pure functions of numbers. Intervals are 95 % percentile intervals; what is compared comes from the same resamples.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mllm.evaluation.intervals import RESAMPLES, interval
from mllm.evaluation.seeds import estimate
from mllm.evaluation.significance import bootstrap_p, holm

_CELLS_AT_ONCE = 10_000_000  # of the (M, C) matrix of how often a picture is drawn


@dataclass(frozen=True)
class Scores:
    """Arm -> right or wrong [S, N], and of each sample its domain, source and the number of its picture."""

    right: dict[str, np.ndarray]
    domain_N: np.ndarray
    source_N: np.ndarray
    picture_N: np.ndarray

    @property
    def seeds(self) -> int:
        """S."""
        return len(next(iter(self.right.values())))

    def groups(self, level: str) -> dict[str, np.ndarray]:
        """Name -> which samples are in it; `level` is "domains" or "sources"."""
        name_N = self.domain_N if level == "domains" else self.source_N
        return {str(name): name_N == name for name in np.unique(name_N)}


@dataclass(frozen=True)
class Measured:
    """Of one quantity its value seed by seed and its bootstrapped values."""

    value_S: np.ndarray
    drawn_M: np.ndarray

    @property
    def value(self) -> float:
        """Mean over seeds."""
        return float(self.value_S.mean())

    def __sub__(self, other: "Measured") -> "Measured":
        return Measured(self.value_S - other.value_S, self.drawn_M - other.drawn_M)

    def interval(self, name: str = "difference") -> dict[str, float]:
        """The value under `name`, with its interval."""
        low, high = interval(self.drawn_M)
        return {name: self.value, "ci_low": low, "ci_high": high}


def mean_of(parts: Sequence[Measured]) -> Measured:
    """The mean over domains."""
    return Measured(
        np.mean([part.value_S for part in parts], axis=0), np.mean([part.drawn_M for part in parts], axis=0)
    )


def draw_seeds(seeds: int, rng: np.random.Generator) -> np.ndarray:
    """[M, S] how often each seed is in a resample."""
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)


def weighted_means(
    right_ASN: np.ndarray, cluster_N: np.ndarray, drawn_MC: np.ndarray, drawn_MS: np.ndarray
) -> np.ndarray:
    """[A, M] the mean of each resampled data set: picture c comes `drawn_MC` times, with all its samples, and seed s
    `drawn_MS` times.
    """
    num_arms, num_seeds, _ = right_ASN.shape
    num_clusters = drawn_MC.shape[1]
    sizes_C = np.bincount(cluster_N, minlength=num_clusters)
    rows = right_ASN.reshape(num_arms * num_seeds, -1)
    totals_ASC = np.stack([np.bincount(cluster_N, row, minlength=num_clusters) for row in rows])
    sums_ASM = (totals_ASC @ drawn_MC.T).reshape(num_arms, num_seeds, -1)
    samples_M = drawn_MC @ sizes_C * drawn_MS.sum(1)
    return (sums_ASM * drawn_MS.T).sum(1) / samples_M


def resampled_means(
    right_ASN: np.ndarray, picture_N: np.ndarray, drawn_MS: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """[A, M] means of data sets whose pictures and seeds are both drawn with replacement, the same for all arms.

    A seed is a training, a picture brings all its questions: neither is independent of what it holds, so both are
    drawn (two-way "pigeonhole" bootstrap, Owen 2007).
    """
    _, cluster_N = np.unique(picture_N, return_inverse=True)
    num_clusters = int(cluster_N.max()) + 1
    chunk = max(1, _CELLS_AT_ONCE // num_clusters)
    means = []
    for start in range(0, len(drawn_MS), chunk):
        part_MS = drawn_MS[start : start + chunk]
        drawn_MC = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=len(part_MS))
        means.append(weighted_means(right_ASN, cluster_N, drawn_MC, part_MS))
    return np.concatenate(means, axis=1)


def measure(scores: Scores, level: str, *, seed: int = 0) -> dict[str, dict[str, Measured]]:
    """Arm -> domain or source -> its mean score, all from the same resampled seeds."""
    drawn_MS = draw_seeds(scores.seeds, np.random.default_rng([seed, 0]))
    right_ASN = np.stack(list(scores.right.values())).astype(np.float64)
    measured: dict[str, dict[str, Measured]] = {arm: {} for arm in scores.right}
    for group, is_in_N in scores.groups(level).items():
        part_ASN = right_ASN[:, :, is_in_N]
        rng = np.random.default_rng([seed, 1, zlib.crc32(group.encode())])
        drawn_AM = resampled_means(part_ASN, scores.picture_N[is_in_N], drawn_MS, rng)
        for arm, right_SN, drawn_M in zip(measured, part_ASN, drawn_AM, strict=True):
            measured[arm][group] = Measured(right_SN.mean(1), drawn_M)
    return measured


def hurts(conflict: Measured) -> bool:
    """Whether the interval of what mixing costs lies above zero."""
    return conflict.interval()["ci_low"] > 0


def recovered(gain: Measured, conflict: Measured) -> dict[str, float] | None:
    """gain / conflict, interval from the same resamples; None where there is no conflict to recover from."""
    if not hurts(conflict):
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_M = np.nan_to_num(gain.drawn_M / conflict.drawn_M)  # a resample without conflict: 1 in 40 at most
    low, high = interval(ratio_M)
    return {"recovery": gain.value / conflict.value, "ci_low": low, "ci_high": high}


def analyse(
    scores: Scores, *, baseline: str, single: str = "single", versus: Sequence[str] = (), aside: Sequence[str] = ()
) -> dict[str, Any]:
    """All that a report tells of scores, as JSON values; shares in [0, 1]. Arms `aside` have scores and no more.

    Returns:
        `arms → name → {domains, sources, mean, by_seed}` with scores and intervals;
        `conflict → {domains, mean}` (None without the arm `single`), `hurts → {domains, mean}`;
        `recovery → arm → {domains, mean}`, None where mixing does not hurt;
        `differences → other → arm → {domains, mean}` for `baseline` and each of `versus`, the mean with `p` and
        `p_holm` over arms (bootstrap) and `t`, the interval and p over seeds alone.
    """
    by_domain, by_source = measure(scores, "domains"), measure(scores, "sources")
    whole = {arm: groups | {"mean": mean_of(list(groups.values()))} for arm, groups in by_domain.items()}
    mixed_arms = [arm for arm in whole if arm != single and arm not in aside]
    found: dict[str, Any] = {
        "arms": {
            arm: {
                "domains": {name: value.interval("score") for name, value in by_domain[arm].items()},
                "sources": {name: value.interval("score") for name, value in by_source[arm].items()},
                "mean": groups["mean"].interval("score"),
                "by_seed": groups["mean"].value_S.tolist(),
            }
            for arm, groups in whole.items()
        },
        "conflict": None,
        "hurts": None,
        "recovery": {},
    }
    if single in whole:
        conflict = _minus(whole[single], whole[baseline])
        tested = {name: value.interval() | _tests(value) for name, value in conflict.items()}
        found["conflict"] = _split(tested)
        found["hurts"] = _split({name: hurts(value) for name, value in conflict.items()})
        for arm in mixed_arms:
            if arm != baseline:
                gain = _minus(whole[arm], whole[baseline])
                found["recovery"][arm] = _split({name: recovered(gain[name], conflict[name]) for name in gain})
    others = [name for name in dict.fromkeys([baseline, *versus]) if name in whole]
    found["differences"] = {
        other: _compare({arm: _minus(whole[arm], whole[other]) for arm in mixed_arms if arm != other})
        for other in others
    }
    return found


def _minus(first: Mapping[str, Measured], second: Mapping[str, Measured]) -> dict[str, Measured]:
    return {name: first[name] - second[name] for name in first}


def _split(values: dict[str, Any]) -> dict[str, Any]:
    """{domain: …, "mean": …} with the domains on a level of their own."""
    return {"domains": {name: value for name, value in values.items() if name != "mean"}, "mean": values["mean"]}


def _tests(value: Measured) -> dict[str, Any]:
    return {"p": bootstrap_p(value.drawn_M), "t": asdict(estimate(value.value_S))}


def _compare(gains: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    """Every arm against one other; p adjusted for the number of arms."""
    gained = {arm: _split({name: value.interval() for name, value in groups.items()}) for arm, groups in gains.items()}
    for arm, groups in gains.items():
        gained[arm]["mean"] |= _tests(groups["mean"])
    for each, p in zip(gained.values(), holm([each["mean"]["p"] for each in gained.values()]), strict=True):
        each["mean"]["p_holm"] = p
    return gained
