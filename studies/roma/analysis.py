"""Paired differences over seeds, trained and held-out families apart. S seeds, N test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from mllm.evaluation.significance import holm, mcnemar_p

RIVALS = ("ce", "random")
WHERE = {"held out": True, "trained": False}
Rows = Mapping[str, np.ndarray]


def means(rows: Rows, where: str, key: str = "right") -> float:
    """Of one run's test rows: mean over families, so that a large one does not drown the others."""
    chosen = rows["is_held_out"] == WHERE[where]
    families = rows["family"][chosen]
    return float(np.mean([rows[key][chosen][families == family].mean() for family in np.unique(families)]))


def paired(differences_S: np.ndarray) -> dict[str, float]:
    """Mean, 95 % t-interval and p over seeds; without spread or with one seed there is no test."""
    mean, number = float(differences_S.mean()), len(differences_S)
    error = differences_S.std(ddof=1) / number**0.5 if number > 1 else 0.0
    if error == 0:
        return {"difference": mean, "ci_low": mean, "ci_high": mean, "p": 1.0}
    half = stats.t.ppf(0.975, number - 1) * error
    p = float(2 * stats.t.sf(abs(mean / error), number - 1))
    return {"difference": mean, "ci_low": mean - half, "ci_high": mean + half, "p": p}


def discordant_p(ours: Sequence[Rows], theirs: Sequence[Rows], where: str) -> float:
    """McNemar's test over the rows of all seeds together."""
    gained = lost = 0
    for one, other in zip(ours, theirs, strict=True):
        chosen = one["is_held_out"] == WHERE[where]
        gained += int((one["right"] & ~other["right"])[chosen].sum())
        lost += int((~one["right"] & other["right"])[chosen].sum())
    return mcnemar_p(gained, lost)


def analyse(runs: Mapping[str, Sequence[tuple[dict[str, Any], Rows]]]) -> dict[str, Any]:
    """Scores of each arm, its differences to base, and the claim. `runs`: arm -> its runs, seeds in the same order."""
    rows = {arm: [each for _, each in seeds] for arm, seeds in runs.items()}
    figures: dict[str, Any] = {"seeds": len(next(iter(rows.values()))), "arms": {}, "claim": {}}
    for arm, seeds in runs.items():
        figures["arms"][arm] = {
            "consistency": {
                when: float(np.mean([record["figures"][f"{when}/ratio"] for record, _ in seeds]))
                for when in ("before", "after")
            },
            "trials": [record["trial"] for record, _ in seeds],
        }
        for where in WHERE:
            names = (arm, "base", "ce" if "ce" in rows else "base")
            score_S, base_S, ce_S = (np.array([means(each, where) for each in rows[name]]) for name in names)
            loss = float(np.mean([means(each, where, "loss") for each in rows[arm]]))
            figures["arms"][arm][where] = {
                "score": float(score_S.mean()),
                "by_seed": score_S.tolist(),
                "loss": loss,
                "to_base": paired(score_S - base_S),
                "to_ce": paired(score_S - ce_S),
            }
    rivals = [name for name in RIVALS if name in rows and "true" in rows]
    for where in WHERE:
        tests = {name: _rival(rows, name, where) for name in rivals}
        for test, p in zip(tests.values(), holm([test["p"] for test in tests.values()]), strict=True):
            test["p_holm"] = p
        figures["claim"][where] = tests
    return figures


def _rival(rows: Mapping[str, Sequence[Rows]], rival: str, where: str) -> dict[str, float]:
    ours_S, theirs_S = (np.array([means(each, where) for each in rows[name]]) for name in ("true", rival))
    return paired(ours_S - theirs_S) | {"mcnemar_p": discordant_p(rows["true"], rows[rival], where)}
