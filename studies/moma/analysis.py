"""η and gaps over paired seeds, and their tables. C points of a curve, S seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from mllm.moma.scoring import LEAKY
from mllm.moma.stream import DIRECTIONS
from studies.moma.arms import DENSE, FROZEN, MAIN
from studies.moma.runs import Run, Study

BALANCED = "balanced"  # mean of the four directions: six of seven scored tokens are codes of pictures
MEASURES = ("all", BALANCED, *DIRECTIONS)
CONTRASTS = [
    (MAIN, "8x"), (MAIN, "1t1i"), (MAIN, FROZEN), (MAIN, "shared"), (MAIN, "token_split"),
    ("token_split", "token_agnostic"),
]  # fmt: skip


def eta(arm: list[dict], dense: list[dict], *, measure: str = "all", axis: str = "flops") -> float:
    """How much more of `axis` dense needs than the arm for the same loss; below 1 where it needs less.

    Where a curve never comes near the other's end within its first point, the figure is a bound, from that point.
    """
    arm_C, arm_loss_C = _curve(arm, measure, axis)
    dense_C, dense_loss_C = _curve(dense, measure, axis)
    if arm_loss_C[-1] <= dense_loss_C[-1]:
        return dense_C[_reached(dense_loss_C, dense_loss_C[-1])] / _compute_at(arm_C, arm_loss_C, dense_loss_C[-1])
    return _compute_at(dense_C, dense_loss_C, arm_loss_C[-1]) / arm_C[_reached(arm_loss_C, arm_loss_C[-1])]


def _curve(points: list[dict], measure: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    losses = np.minimum.accumulate([point["losses"][measure] for point in points])
    return np.array([point[axis] for point in points], dtype=float), losses


def _reached(loss_C: np.ndarray, loss: float) -> int:
    """The first point at which a falling curve is as low as a loss."""
    return int(np.argmax(loss_C <= loss))


def _compute_at(compute_C: np.ndarray, loss_C: np.ndarray, loss: float) -> float:
    """Where a falling curve first reaches a loss, interpolated in log compute."""
    k = _reached(loss_C, loss)
    if k == 0:
        return float(compute_C[0])
    part = (loss_C[k - 1] - loss) / (loss_C[k - 1] - loss_C[k])
    low, high = np.log(compute_C[k - 1 : k + 1])
    return float(np.exp(low + part * (high - low)))


def interval(values_S: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over seeds; without width for one seed or equal values."""
    mean = float(np.mean(values_S))
    half = float(stats.sem(values_S) * stats.t.ppf(0.975, len(values_S) - 1)) if len(values_S) > 1 else 0.0
    return mean, mean - half, mean + half


def analyse(study: Study, arms: list[str], seeds: int) -> dict[str, dict]:
    """Arm -> its rate, losses, η by measure in FLOPs and seconds, and gap; paired over seeds."""
    results = {}
    for arm in arms:
        found = {seed: pair for seed in range(seeds) if (pair := _pair(study, arm, seed))}
        if not found:
            continue
        pairs = list(found.values())
        finals = [mine["final"] for mine, _ in pairs]
        results[arm] = {
            "rate": study.rate_of(arm),
            "seeds": list(found),
            "commits": sorted({mine["made"]["commit"] for mine, _ in pairs}),
            "parameters": pairs[0][0]["parameters"],
            "active": {mode: float(np.mean([mine["active"][mode] for mine, _ in pairs])) for mode in finals[0]},
            "flops_a_step": pairs[0][0]["flops_a_step"],
            "losses": {
                mode: {
                    measure: float(np.mean([final[mode][measure] for final in finals])) for measure in finals[0][mode]
                }
                for mode in finals[0]
            },
            "leaky_gap": _gap(finals),
            "eta": {axis: _etas(pairs, axis) for axis in ("flops", "seconds")},
        }
    return results


def _pair(study: Study, arm: str, seed: int) -> tuple[dict, dict] | None:
    if study.rate_of(arm) is None or study.rate_of(DENSE) is None:
        return None
    mine, base = (_record(study, name, seed) for name in (arm, DENSE))
    return (mine, base) if mine and base else None


def _record(study: Study, arm: str, seed: int) -> dict | None:
    """A finished run, its losses with their balanced mean."""
    rate = study.rate_of(arm)
    record = study.record(Run(arm, rate, seed, "test")) if rate is not None else None
    if record:
        for losses in [*(point["losses"] for point in record["curve"]), *record["final"].values()]:
            if all(direction in losses for direction in DIRECTIONS):
                losses[BALANCED] = float(np.mean([losses[direction] for direction in DIRECTIONS]))
    return record


def _etas(pairs: list[tuple[dict, dict]], axis: str) -> dict[str, list[float]]:
    measures = [measure for measure in MEASURES if measure in pairs[0][0]["curve"][-1]["losses"]]
    logs = {
        measure: [np.log(eta(mine["curve"], base["curve"], measure=measure, axis=axis)) for mine, base in pairs]
        for measure in measures
    }
    return {measure: np.exp(interval(values)).tolist() for measure, values in logs.items()}


def _gap(finals: list[dict]) -> dict[str, list[float]]:
    """Causal (thresholds) minus leaky loss: what a leaky figure would have promised. Empty where nothing leaks."""
    if LEAKY not in finals[0]:
        return {}
    return {
        measure: list(interval([final["threshold"][measure] - final[LEAKY][measure] for final in finals]))
        for measure in finals[0][LEAKY]
    }


def contrasts(study: Study, seeds: int) -> dict[str, dict]:
    """ "one - other" -> seeds, and by measure the paired difference of causal losses at the end, with its interval.

    Below zero the first is better.
    """
    found = {}
    for one, other in CONTRASTS:
        pairs = [(_record(study, one, seed), _record(study, other, seed)) for seed in range(seeds)]
        ends = [[record["curve"][-1]["losses"] for record in pair] for pair in pairs if all(pair)]
        if ends:
            found[f"{one} - {other}"] = {"seeds": len(ends)} | {
                measure: list(interval([mine[measure] - its[measure] for mine, its in ends]))
                for measure in MEASURES
                if measure in ends[0][0]
            }
    return found


def as_markdown(results: dict[str, dict], differences: dict[str, dict], speeds: dict[str, dict[str, dict]]) -> str:
    """Tables: η, causal losses, `contrasts`, gaps, sizes; and what `speed.measure` found, by rows a step."""
    measures = [measure for measure in MEASURES if measure in next(iter(results.values()))["eta"]["flops"]]

    def table(title: str, cell: Any, rows: list[str]) -> list[str]:
        lines = [f"**{title}**", "", f"| arm | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
        return [*lines, *(f"| {arm} | {' | '.join(cell(arm, m) for m in measures)} |" for arm in rows), ""]

    def spread(values: list[float]) -> str:
        return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"

    def signed(values: list[float]) -> str:
        return f"{values[0]:+.3f} [{values[1]:+.3f}, {values[2]:+.3f}]"

    def active(arm: str) -> str:
        return ", ".join(f"{mode} {size / 1e6:.2f}" for mode, size in results[arm]["active"].items())

    def pace(arm: str) -> str:
        cells = [f"{100 * (found[arm]['ratio'] - 1):+.1f} %" if arm in found else "–" for found in speeds.values()]
        return "".join(f" {cell} |" for cell in cells)

    lines = ["# MoMa study", "", "Geometric means (η) and means over paired seeds, with 95 % t-intervals.", ""]
    for axis in ("flops", "seconds"):
        lines += table(
            f"η in {axis}: how much more dense needs for the same causal held-out loss",
            lambda arm, m, axis=axis: spread(results[arm]["eta"][axis][m]),
            list(results),
        )
    for mode in ("threshold", "aux", "token"):
        rows = [arm for arm in results if mode in results[arm]["losses"]]
        lines += table(
            f"causal loss, nats a token: {mode}",
            lambda arm, m, mode=mode: f"{results[arm]['losses'][mode][m]:.3f}",
            rows,
        )
    lines += table(
        "causal loss, the first minus the second, same seeds: below zero the first is better",
        lambda pair, m: signed(differences[pair][m]),
        list(differences),
    )
    leaking = [arm for arm in results if results[arm]["leaky_gap"]]
    lines += table("causal minus leaky loss", lambda arm, m: spread(results[arm]["leaky_gap"][m]), leaking)
    paces = "".join(f" steps a second beside dense, {rows} rows a step |" for rows in speeds)
    lines += [
        f"| arm | rate | seeds | parameters, M | active, M | active when scored, M | GFLOP a step |{paces}",
        "|---" * (7 + len(speeds)) + "|",
    ]
    lines += [
        f"| {arm} | {r['rate']:g} | {len(r['seeds'])} | {r['parameters']['total'] / 1e6:.2f} | "
        f"{r['parameters']['active'] / 1e6:.2f} | {active(arm)} | {r['flops_a_step'] / 1e9:.1f} |{pace(arm)}"
        for arm, r in results.items()
    ]
    return "\n".join(lines) + "\n"
