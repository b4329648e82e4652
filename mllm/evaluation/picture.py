"""The report as one picture: scores per domain above, where the tokens of each domain and modality went below."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

# Okabe and Ito's colours, told apart by colour-blind readers too, after a grey for the first arm: the one to beat.
COLOURS = ("#8d99a6", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_INK, _FAINT = "#22303c", "#dde2e7"
_TEXT = {"fontsize": 9, "color": _INK}
_TITLE = {"fontsize": 11, "color": _INK, "fontweight": "bold", "loc": "left"}
_MOST_NUMBERED_CELLS = 120
_MOST_EXPERT_LABELS = 8
_PANELS_A_ROW = 5
_Shares = Mapping[str, Mapping[str, list[float]]]  # panel -> layer -> share of picks for each expert


def draw_report(report: dict, path: str | Path) -> None:
    """Writes a PNG: a bar with its 95 % interval per domain and arm, in it a hollow bar for the blanked picture, and a
    dashed line for the blind baseline; below, per routed arm, the share of picks by layer and expert, all null
    experts together in the last column, for the tokens of each domain, and of each modality.
    """
    panels = {name: _panels(routing) for name, routing in report["routing"].items()}
    heights = [4.0, *(_heat_height(shares) for shares in panels.values())]
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained", facecolor="white")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_scores(parts[0].subplots(), report["arms"])
    for part, (name, shares) in zip(parts[1:], panels.items(), strict=True):
        _draw_heat_maps(part, name, shares, report["routing"][name]["experts"])
    figure.savefig(path, dpi=160)


def _draw_scores(axes: Axes, arms: Mapping[str, dict]) -> None:
    columns = {name: [*arm["domains"].values(), arm["mean"]] for name, arm in arms.items()}
    any_arm = next(iter(arms.values()))
    width = min(0.8 / len(arms), 0.3)
    for number, (name, figures) in enumerate(columns.items()):
        centres = np.arange(len(figures)) + (number - (len(arms) - 1) / 2) * width
        _draw_arm(axes, centres, 0.9 * width, figures, name, COLOURS[number % len(COLOURS)])
    for place, figures in enumerate([*any_arm["domains"].values(), any_arm["mean"]]):
        if figures["blind"] is not None:
            axes.hlines(
                100 * figures["blind"], place - 0.44, place + 0.44, _INK, linestyles=(0, (4, 2)), lw=1.3, zorder=5
            )

    labels = [f"{domain}\nn = {figures['n']:,}" for domain, figures in any_arm["domains"].items()]
    axes.set_xticks(range(len(labels) + 1), [*labels, "mean\nover domains"], **_TEXT)
    axes.axvline(len(labels) - 0.5, color=_FAINT, lw=1)
    axes.set_ylim(0, 109)
    axes.set_yticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)], **_TEXT)
    axes.grid(axis="y", color=_FAINT, lw=0.8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("Score per domain, with 95 % intervals", **_TITLE)
    axes.legend(
        handles=_legend(arms),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=len(arms) + 2,
        frameon=False,
        fontsize=9,
    )


def _draw_arm(axes: Axes, centres: np.ndarray, width: float, figures: list[dict], name: str, colour: str) -> None:
    scores, lows, highs = (100 * np.array([each[key] for each in figures]) for key in ("score", "ci_low", "ci_high"))
    axes.bar(centres, scores, width, color=colour, label=name, zorder=2)
    # A percentile interval need not contain the score itself, and a whisker cannot have negative length.
    whiskers = np.clip([scores - lows, highs - scores], 0, None)
    axes.errorbar(centres, scores, whiskers, fmt="none", ecolor=_INK, elinewidth=1.2, capsize=3, zorder=4)
    for centre, score, high in zip(centres, scores, highs, strict=True):
        axes.text(centre, max(score, high) + 1.2, f"{score:.0f}", ha="center", va="bottom", **_TEXT)
    for centre, each in zip(centres, figures, strict=True):
        if each["blanked"] is not None:
            axes.bar(centre, 100 * each["blanked"], 0.6 * width, facecolor="white", edgecolor=colour, lw=1.4, zorder=3)


def _legend(arms: Mapping[str, dict]) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = [
        Patch(color=COLOURS[number % len(COLOURS)], label=name) for number, name in enumerate(arms)
    ]
    if any(arm["mean"]["blanked"] is not None for arm in arms.values()):
        handles.append(Patch(facecolor="white", edgecolor=_INK, label="picture blanked"))
    if any(arm["mean"]["blind"] is not None for arm in arms.values()):
        handles.append(Line2D([], [], color=_INK, linestyle=(0, (4, 2)), lw=1.3, label="blind baseline"))
    return handles


def _panels(routing: dict) -> _Shares:
    """A panel a domain; and one a modality, unless all tokens are of one and it would repeat the domains."""
    modalities = routing["modality_shares"]
    of_modality = {f"{name} tokens": shares for name, shares in modalities.items()} if len(modalities) > 1 else {}
    return routing["shares"] | of_modality


def _rows(panels: _Shares) -> int:
    return -(-len(panels) // _PANELS_A_ROW)


def _heat_height(panels: _Shares) -> float:
    """Inches."""
    layers = max(len(by_layer) for by_layer in panels.values())
    return 0.3 + _rows(panels) * min(0.8 + 0.26 * layers, 10.0)


def _draw_heat_maps(figure: SubFigure, arm: str, panels: _Shares, experts: list[str]) -> None:
    title = f"Share of picks per expert, {arm}" + (" (null: grey, black is 100 %)" if "null" in experts else "")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK, fontweight="bold")
    grid = figure.subplots(_rows(panels), min(len(panels), _PANELS_A_ROW), sharey=True, squeeze=False)
    tables = {name: np.array(list(by_layer.values())) for name, by_layer in panels.items()}
    is_real = np.array([expert != "null" for expert in experts])
    most = max(table[:, is_real].max() for table in tables.values()) or 1.0
    for axes, (name, table) in zip(grid.flat, tables.items(), strict=False):
        axes.set_title(name, **_TEXT)
        drawn = _draw_heat_map(axes, table, is_real, most)
        _label_heat_map(axes, list(panels[name]), experts)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer", **_TEXT)
    bar = figure.colorbar(
        drawn, ax=list(grid.flat), fraction=0.03, pad=0.02, format=lambda share, _: f"{100 * share:.0f} %"
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0, colors=_INK)


def _draw_heat_map(axes: Axes, table: np.ndarray, is_real: np.ndarray, most: float) -> AxesImage:
    """Null picks, often most of all, have a colour and a scale of their own: else nothing is seen of the experts."""
    drawn = axes.imshow(np.where(is_real, table, np.nan), cmap="Blues", vmin=0, vmax=most, aspect="auto")
    axes.imshow(np.where(is_real, np.nan, table), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    if table.size <= _MOST_NUMBERED_CELLS:
        for (row, column), share in np.ndenumerate(table):
            colour = "white" if share > (0.6 * most if is_real[column] else 0.45) else _INK
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return drawn


def _label_heat_map(axes: Axes, layers: list[str], experts: list[str]) -> None:
    step = -(-len(experts) // _MOST_EXPERT_LABELS)
    has_null = experts[-1] == "null"
    labelled = [*range(0, len(experts) - step * has_null, step), *([len(experts) - 1] if has_null else [])]
    axes.set_xticks(labelled, [experts[number] for number in labelled], **_TEXT)
    axes.set_yticks(range(len(layers)), [_layer_label(layer) for layer in layers], **_TEXT)
    axes.set_xlabel("expert", **_TEXT)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _layer_label(layer: str) -> str:
    """The number in a name like `model.language_model.layers.3.mlp`."""
    numbers = re.findall(r"\d+", layer)
    return numbers[-1] if numbers else layer
