"""All runs of a study read together: a table, summary.json, a picture and the README of the results.

S seeds, F families of arms.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mllm.common.provenance import provenance
from studies.adamoe.analysis import (
    Estimate,
    correlation,
    estimate,
    experts_over_layers,
    holm,
    loss_at_load,
)
from studies.adamoe.runs import Arm, Study, plan_of, tokens_of
from studies.runner import Job, RunFolder, record_of

CURVE = ("dropping", "top-2")  # what others are measured against: the same model at any load, by chance
REFERENCE = "top2"
PRIMARY = ("null", "shared null", "identity null", "top-p", "top-1")  # one family of tests; the other arms explain
TITLES = {"a": "Part A: adapters on miniworld", "b": "Part B: native MoE on English prose"}
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#22303c")


@dataclass(frozen=True)
class ArmResult:
    """One arm: its figures seed by seed and what follows from them; `distance` is None for the curve's own arms."""

    arm: Arm
    figures: dict[str, list[float]]
    distance_S: list[float]
    distance: Estimate
    to_top2: Estimate
    follows_loss: Estimate
    follows_frequency: Estimate

    def mean(self, figure: str) -> float:
        """Over seeds."""
        return float(np.mean(self.figures[figure]))


@dataclass(frozen=True)
class PartResult:
    """`families` holds the primary comparison: distance at equal load, mean over a family's arms; `holm` its p."""

    part: str
    seeds: list[int]
    arms: list[ArmResult]
    families: dict[str, Estimate]
    holm: dict[str, float]
    commits: list[str]


def read_part(study: Study, runs: RunFolder, seeds: int) -> PartResult | None:
    """The seeds of which every arm is there; None where there is no such seed."""
    plan = plan_of(study, seeds)
    seeds = plan.complete_seeds(runs)
    if not seeds:
        return None
    records = {arm.name: [record_of(plan, Job(arm, seed), runs) for seed in seeds] for arm in study.arms}
    figures = {arm: [record["figures"] for record in group] for arm, group in records.items()}
    reference = [tokens_of(study, Job(_arm(study, REFERENCE), seed), runs) for seed in seeds]
    curve = [arm.name for arm in study.arms if arm.family in CURVE]
    results = []
    for arm in study.arms:
        distance_S, loss_S, frequency_S = [], [], []
        for s, seed in enumerate(seeds):
            points = [(figures[name][s]["load"], figures[name][s]["loss"]) for name in curve]
            mine, tokens = figures[arm.name][s], tokens_of(study, Job(arm, seed), runs)
            distance_S.append(mine["loss"] - loss_at_load(*zip(*points, strict=True), mine["load"]))
            taken_N = experts_over_layers(tokens.real_picks_NL)
            loss_S.append(correlation(taken_N, reference[s].loss_N, tokens.position_N))
            frequency_S.append(correlation(taken_N, tokens.log_frequency_N, tokens.position_N))
        if arm.name in curve:
            distance_S = [np.nan] * len(seeds)
        to_top2_S = [
            mine["loss"] - top2["loss"] for mine, top2 in zip(figures[arm.name], figures[REFERENCE], strict=True)
        ]
        by_seed = {name: [run[name] for run in figures[arm.name]] for name in figures[arm.name][0]}
        estimates = (estimate(values_S) for values_S in (distance_S, to_top2_S, loss_S, frequency_S))
        results.append(ArmResult(arm, by_seed, distance_S, *estimates))
    named = {arm.family for arm in study.arms}
    families = {family: _family_estimate(results, family) for family in PRIMARY if family in named}
    adjusted = holm({family: each.p for family, each in families.items()})
    commits = {record["made"]["commit"] for group in records.values() for record in group}
    return PartResult(study.part, seeds, results, families, adjusted, sorted(commits))


def _arm(study: Study, name: str) -> Arm:
    return next(arm for arm in study.arms if arm.name == name)


def _family_estimate(results: list[ArmResult], family: str) -> Estimate:
    """Over seeds of the mean over the family's arms; arms off the curve are left out."""
    by_seed = zip(*(result.distance_S for result in results if result.arm.family == family), strict=True)
    on_curve = ([value for value in distances if not np.isnan(value)] for distances in by_seed)
    return estimate([np.mean(distances) if distances else np.nan for distances in on_curve])


# -- in words and tables -----------------------------------------------------------------------------------------------


def span(value: Estimate, digits: int = 4) -> str:
    """Mean ± half the interval, which is even; a dash where there is none."""
    if np.isnan(value.mean):
        return "–"
    return f"{value.mean:+.{digits}f}" + ("" if np.isnan(value.low) else f" ± {value.mean - value.low:.{digits}f}")


HEADINGS = ("arm", "load", "loss", "right %", "to dropping", "to top-2", "~ loss", "~ frequency", "Var", "none %")
LEGEND = """\
`load`: real experts a token and layer, measured on held-out data · `to dropping`: loss less that of random dropping at
the same load · `to top-2`: loss less that of plain top-2 · `~ loss`, `~ frequency`: Spearman correlation of a token's
number of real experts with its loss under top-2, and with its log frequency · `Var`: variance of that number within a
layer · `none`: share of tokens without a real expert in a layer. ±: 95 % t-intervals over paired seeds; below zero is
better for losses."""


def rows(result: PartResult) -> list[list[str]]:
    """A row an arm, in the order of HEADINGS."""
    return [
        [
            each.arm.name,
            f"{each.mean('load'):.2f}",
            f"{each.mean('loss'):.4f}",
            f"{100 * each.mean('right'):.1f}",
            span(each.distance),
            span(each.to_top2) if each.arm.name != REFERENCE else "–",
            span(each.follows_loss, 2),
            span(each.follows_frequency, 2),
            f"{each.mean('variance'):.2f}",
            f"{100 * each.mean('none'):.1f}",
        ]
        for each in result.arms
    ]


def verdicts(result: PartResult) -> list[str]:
    """The primary comparison, a sentence a family, and whether the number of experts follows difficulty."""
    sentences = []
    for family, each in result.families.items():
        if np.isnan(each.p):
            sentences.append(f"**{family}**: {each.n} comparable seed(s), too few for an interval.")
            continue
        found = "no difference shown"
        if result.holm[family] < 0.05:
            found = "better" if each.mean < 0 else "worse"
        sentences.append(
            f"**{family}** against random dropping at equal load: {found}; loss {span(each)} over {each.n} seeds, "
            f"p = {result.holm[family]:.2g} (Holm); detectable with these seeds: {each.detectable:.4f}."
        )
    chance = max((abs(r.follows_loss.mean) for r in result.arms if r.arm.family == "dropping"), default=np.nan)
    for each in result.arms:
        if each.arm.family not in (*CURVE, "top-1") and not np.isnan(each.follows_loss.low):
            word = (
                "harder tokens take more experts" if each.follows_loss.mean > 0 else "harder tokens take fewer experts"
            )
            if each.follows_loss.low <= 0 <= each.follows_loss.high:
                word = "the number of experts cannot be told from chance"
            sentences.append(
                f"{each.arm.name}: {word}; rho with the loss {span(each.follows_loss, 3)}, with frequency "
                f"{span(each.follows_frequency, 3)} (random dropping: at most {chance:.3f} with the loss)."
            )
    return sentences


def write_report(results: Sequence[PartResult], folder: Path, console: Console) -> None:
    """Prints the tables; writes summary.json, pareto.png and README.md, which a conclusion.md in the folder opens."""
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        table = Table(*HEADINGS, title=f"{TITLES[result.part]}, {len(result.seeds)} seeds")
        for row in rows(result):
            table.add_row(*row)
        console.print(table, *verdicts(result), sep="\n")
    made = provenance()
    summary = {"provenance": made, "parts": {result.part: _plain(result) for result in results}}
    (folder / "summary.json").write_text(json.dumps(_strict(summary), indent=1) + "\n", encoding="utf-8")
    draw(results, folder / "pareto.png")
    (folder / "README.md").write_text(_readme(results, folder, made), encoding="utf-8")


def _plain(result: PartResult) -> dict[str, Any]:
    return asdict(result) | {"arms": {each.arm.name: asdict(each) for each in result.arms}}


def _strict(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null stands for it."""
    return json.loads(json.dumps(values), parse_constant=lambda _: None)


def _readme(results: Sequence[PartResult], folder: Path, made: dict[str, str]) -> str:
    conclusion = folder / "conclusion.md"
    parts = ["# Null experts against their rivals at equal load"]
    parts += [conclusion.read_text(encoding="utf-8").strip()] if conclusion.is_file() else []
    parts.append(
        "Written by `python -m studies.adamoe --part report`; what is compared, and how it was named "
        "beforehand, is said in `studies/adamoe/__init__.py`. All seeds are in `summary.json`.\n\n"
        f"{LEGEND}\n\n"
        f"{made['date']}, {made['device']}, torch {made['torch']}, transformers {made['transformers']}.\n\n"
        "![loss against load](pareto.png)"
    )
    for result in results:
        lines = [" | ".join(HEADINGS), " | ".join("---" for _ in HEADINGS), *(" | ".join(row) for row in rows(result))]
        parts.append(f"## {TITLES[result.part]}")
        parts.append(f"Seeds {', '.join(map(str, result.seeds))}; commit {', '.join(result.commits)}.")
        parts.append("\n".join(f"- {sentence}" for sentence in verdicts(result)))
        parts.append("\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(parts) + "\n"


# -- the picture -------------------------------------------------------------------------------------------------------


def draw(results: Sequence[PartResult], path: Path) -> None:
    """Loss less that of top-2 of the same seed, against load: a panel a part, a marker a family, 95 % whiskers."""
    figure = Figure(figsize=(6.5 * len(results), 4.8), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        curve = sorted((each for each in result.arms if each.arm.family in CURVE), key=lambda each: each.mean("load"))
        axes.plot([e.mean("load") for e in curve], [e.to_top2.mean for e in curve], color="#8d99a6", zorder=1)
        for number, family in enumerate(dict.fromkeys(each.arm.family for each in result.arms)):
            mine = [each for each in result.arms if each.arm.family == family]
            means = [each.to_top2.mean for each in mine]
            whiskers = np.nan_to_num([[e.to_top2.mean - e.to_top2.low, e.to_top2.high - e.to_top2.mean] for e in mine])
            axes.errorbar(
                [each.mean("load") for each in mine],
                means,
                whiskers.T,
                fmt=MARKERS[number % len(MARKERS)],
                color="#8d99a6" if family in CURVE else COLOURS[number % len(COLOURS)],
                capsize=3,
                label=family,
            )
        axes.set_title(f"{TITLES[result.part]} ({len(result.seeds)} seeds)", loc="left", fontsize=10)
        axes.set_xlabel("measured load: real experts a token and layer")
        axes.set_ylabel("loss less that of top-2, same seed")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
