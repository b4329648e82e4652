"""A study as pictures: scores by arm and domain, and what experts tell of domain and modality in every layer."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mllm.evaluation.picture import COLOURS

_INK, _FAINT, _ALONE = "#22303c", "#dde2e7", "#009e73"
_TEXT = {"fontsize": 9, "color": _INK}
_TITLE = {"fontsize": 10, "color": _INK, "fontweight": "bold", "loc": "left"}


def draw_scores(summary: dict[str, Any], path: Path) -> None:
    """A panel for the mean and each domain: an arm a line, its score with its interval and, in the mean's panel, every
    seed; upright lines at the baseline (grey) and at `single` (green).
    """
    arms = summary["arms"]
    domains = list(next(iter(arms.values()))["domains"])
    figure = Figure(
        figsize=(2.6 * (1 + len(domains)) + 1.2, 1.2 + 0.3 * len(arms)), layout="constrained", facecolor="white"
    )
    panels = figure.subplots(1, 1 + len(domains), sharey=True)
    for axes, name in zip(panels, ["mean", *domains], strict=True):
        _draw_panel(axes, summary, name)
    panels[0].set_yticks(range(len(arms)), arms, **_TEXT)
    panels[0].invert_yaxis()
    figure.supxlabel("right to the letter, per cent, with 95 % intervals over seeds and pictures", **_TEXT)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Axes, summary: dict[str, Any], name: str) -> None:
    arms = summary["arms"]
    measured = [arm["mean"] if name == "mean" else arm["domains"][name] for arm in arms.values()]
    scores, lows, highs = (100 * np.array([each[key] for each in measured]) for key in ("score", "ci_low", "ci_high"))
    for arm, colour in ((summary["baseline"], COLOURS[0]), ("single", _ALONE)):
        if arm in arms:
            axes.axvline(scores[list(arms).index(arm)], color=colour, lw=1.2, zorder=1)
    if name == "mean":
        for place, arm in enumerate(arms.values()):
            axes.plot(100 * np.array(arm["by_seed"]), [place] * len(arm["by_seed"]), "|", color=COLOURS[1], zorder=2)
    # A percentile interval need not contain the score itself, and a whisker cannot have negative length.
    whiskers = np.clip([scores - lows, highs - scores], 0, None)
    axes.errorbar(scores, range(len(arms)), xerr=whiskers, fmt="o", ms=4, color=_INK, elinewidth=1, capsize=2, zorder=3)
    axes.set_title(name if name != "mean" else "mean over domains", **_TITLE)
    axes.grid(axis="x", color=_FAINT, lw=0.8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=_INK)


def draw_routing(summary: dict[str, Any], path: Path) -> bool:
    """Mutual information of picks with domain (left) and modality (right) by layer, an arm a line. False, and no
    picture, where nothing is routed.
    """
    routed = {name: arm["routing"] for name, arm in summary["arms"].items() if arm["routing"] is not None}
    if not routed:
        return False
    figure = Figure(figsize=(9.5, 1.6 + 0.25 * max(len(routed), 8)), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(panels, ("mi_domain", "mi_modality"), ("domain", "modality"), strict=True):
        for number, (name, routing) in enumerate(routed.items()):
            # Routers of single linears give several values a layer; they are numbered in their order.
            values = [routing["summary"][f"routing/{key}/{layer}"] for layer in routing["layers"]]
            style = ("o-", "s--", "^:")[number // len(COLOURS) % 3]
            places = np.linspace(0, 1, len(values)) if len(values) > 1 else [0.5]
            axes.plot(places, values, style, ms=4, lw=1.2, color=COLOURS[number % len(COLOURS)], label=name)
        axes.set_title(f"what a pick tells of the {title} (nats)", **_TITLE)
        axes.set_xlabel("depth: first to last router", **_TEXT)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, labelcolor=_INK)
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    return True
