"""The study as a picture: loss by compute of every arm, and η with intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from studies.moma.analysis import MEASURES
from studies.moma.runs import Run, Study

_INK, _FAINT = "#22303c", "#dde2e7"
_TEXT = {"fontsize": 9, "color": _INK}
_SHOWN = 1 / 5, 5.0  # of η; wider intervals run out of the picture, the table has them


def draw(study: Study, results: dict[str, dict], path: Path) -> None:
    """Left: mean curve over seeds, causal held-out loss by FLOPs. Right: η in FLOPs by direction, an arm a line."""
    measures = [measure for measure in MEASURES if measure in next(iter(results.values()))["eta"]["flops"]]
    figure = Figure(figsize=(13, 1.6 + 0.36 * len(results)), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 1 + len(measures), width_ratios=[2.2] + [1] * len(measures))
    for number, arm in enumerate(results):
        runs = [study.record(Run(arm, results[arm]["rate"], seed, "test")) for seed in results[arm]["seeds"]]
        flops = [point["flops"] for point in runs[0]["curve"]]
        losses = np.mean([[point["losses"]["all"] for point in run["curve"]] for run in runs], axis=0)
        panels[0].plot(flops, losses, label=arm, lw=1.4, color=colormaps["tab20"](number))
    panels[0].set_xscale("log")
    panels[0].set_title("causal loss by FLOPs, all tokens", **_TEXT)
    panels[0].legend(fontsize=7, frameon=False)
    for axes, measure in zip(panels[1:], measures, strict=True):
        means, lows, highs = np.array([each["eta"]["flops"][measure] for each in results.values()]).T
        whiskers = np.clip([means - lows, highs - means], 0, None)
        axes.errorbar(means, range(len(results)), xerr=whiskers, fmt="o", ms=4, color=_INK, elinewidth=1, capsize=2)
        axes.axvline(1, color=_FAINT, zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(*_SHOWN)
        axes.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4]))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"η, {measure}", **_TEXT)
        axes.set_yticks(range(len(results)), list(results) if measure == measures[0] else [""] * len(results), **_TEXT)
        axes.invert_yaxis()
    for axes in panels:
        axes.grid(axis="x", color=_FAINT, lw=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(which="both", length=0, labelsize=8, labelcolor=_INK)
    figure.savefig(path, dpi=150)
