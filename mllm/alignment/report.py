"""What alignment did: whether neighbours are routed alike now, which layers moved, and a picture of it.

N samples, K neighbours, R length of a routing vector, X experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mllm.alignment.neighbours import Neighbours
from mllm.evaluation.picture import COLOURS
from mllm.evaluation.tables import Titled, with_interval

BOOTSTRAPS = 2000


def consistency(vectors_NR: Tensor, neighbours: Neighbours, rows: Sequence[int], *, seed: int = 0) -> dict[str, float]:
    """Mean ‖r_i - r_j‖² over the rows' neighbours, and over others drawn at random from among all rows' neighbours.

    `nearest` and `random`, and their `ratio`: 1 where routing knows nothing of the task, towards 0 where it follows it.
    """
    ids_NK = neighbours.ids_NK[list(rows)]
    pool_C = neighbours.ids_NK[neighbours.ids_NK >= 0].unique()
    drawn = torch.randint(len(pool_C), ids_NK.shape, generator=torch.Generator().manual_seed(seed))
    own_NR = vectors_NR[list(rows)]

    def apart(others_NK: Tensor) -> Tensor:
        return (own_NR[:, None] - vectors_NR[others_NK.clamp(min=0)]).square().sum(-1)

    is_there_NK = ids_NK >= 0
    is_other_NK = is_there_NK & (pool_C[drawn] != torch.as_tensor(list(rows))[:, None])
    nearest, random = apart(ids_NK)[is_there_NK].mean().item(), apart(pool_C[drawn])[is_other_NK].mean().item()
    return {"nearest": nearest, "random": random, "ratio": nearest / random if random else float("nan")}


def moved_layers(
    before_NR: Tensor,
    after_NR: Tensor,
    sizes: Sequence[int],
    names: Sequence[str],
    initial: Mapping[str, Tensor],
    final: Mapping[str, Tensor],
) -> dict[str, dict[str, float]]:
    """Of each layer: how far its weights moved, in their own length; how far routing at the chosen token did (total
    variation, in [0, 1]); and the share of samples whose first pick there is another one."""
    figures = {}
    parts = zip(names, before_NR.split(list(sizes), 1), after_NR.split(list(sizes), 1), strict=True)
    for name, before_NX, after_NX in parts:
        own = [key for key in initial if key.rpartition(".")[0] == name]
        moved = sum((final[key] - initial[key]).square().sum() for key in own).sqrt()
        figures[name] = {
            "weights_moved": (moved / sum(initial[key].square().sum() for key in own).sqrt()).item(),
            "routing_moved": ((after_NX - before_NX).abs().sum(1) / 2).mean().item(),
            "other_pick": (after_NX.argmax(1) != before_NX.argmax(1)).float().mean().item(),
        }
    return figures


def shares_with_intervals(right_N: Tensor, groups: Sequence[str], *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Share that is right of each group and of `all`, with a 95 % bootstrap interval: where there is one forward and no
    answer file. Reports of a stage take the evaluation's own."""
    rng, values = np.random.default_rng(seed), right_N.double().numpy()
    names = np.array(groups)
    return {
        name: _share(values[names == name] if name != "all" else values, rng) for name in [*sorted(set(groups)), "all"]
    }


def _share(values: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    means = rng.choice(values, (BOOTSTRAPS, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"n": len(values), "score": float(values.mean()), "ci_low": float(low), "ci_high": float(high)}


def alignment_tables(report: Mapping) -> Iterator[Titled]:
    """The report's own tables: neighbours, layers and, where λ was chosen, the choice."""
    before, after = report["consistency"]["before"], report["consistency"]["after"]
    yield (
        "Neighbour consistency (mean ‖r_i − r_j‖²)",
        ["", "before", "after"],
        [[name, f"{before[name]:.4f}", f"{after[name]:.4f}"] for name in ("nearest", "random", "ratio")],
    )
    heads = ["layer", "weights moved", "routing moved", "other first pick"]
    rows = [
        [name, *(f"{100 * figures[key]:.1f} %" for key in ("weights_moved", "routing_moved", "other_pick"))]
        for name, figures in report["layers"].items()
    ]
    yield "Layers", heads, rows
    if report.get("scores"):
        groups = report["scores"]["before"]
        rows = [[g, *(with_interval(report["scores"][w][g]["score"], report["scores"][w][g]) for w in report["scores"])]
                for g in groups]  # fmt: skip
        yield "Right to the letter", ["task", *report["scores"]], rows
    if report.get("choice"):
        heads, rows = ["λ", "validation loss", "right to the letter"], []
        for tried in report["choice"]:
            mark = " *" if tried["chosen"] else ""
            rows.append([f"{tried['weight']:g}{mark}", f"{tried['loss']:.4f}", f"{100 * tried['exact']:.1f} %"])
        yield "Weight of the regulariser, chosen by validation loss", heads, rows


# -- the picture -------------------------------------------------------------------------------------------------------


def project(vectors_NR: Tensor, *, seed: int = 0) -> tuple[Tensor, str]:
    """Vectors in the plane [N, 2], and by what: t-SNE where scikit-learn is installed, else principal components."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        centred_NR = vectors_NR - vectors_NR.mean(0)
        _, _, axes_RR = torch.linalg.svd(centred_NR, full_matrices=False)
        return centred_NR @ axes_RR[:2].T, "principal components"
    perplexity = min(30, (len(vectors_NR) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors_NR.numpy())
    return torch.from_numpy(plane), "t-SNE"


def draw_routing(before_NR: Tensor, after_NR: Tensor, tasks: Sequence[str], path: str | Path) -> None:
    """A PNG: routing vectors before and after in one plane, coloured by task."""
    plane, method = project(torch.cat([before_NR, after_NR]))
    figure = Figure(figsize=(9.5, 4.6), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, title, points in zip(panels, ("before", "after"), plane.chunk(2), strict=True):
        for number, task in enumerate(sorted(set(tasks))):
            chosen = torch.tensor([name == task for name in tasks])
            colour = COLOURS[number % len(COLOURS)]
            marker = "os^Dv"[number // len(COLOURS) % 5]
            axes.scatter(*points[chosen].T, s=9, color=colour, marker=marker, alpha=0.7, linewidths=0, label=task)
        axes.set_title(f"routing vectors {title} alignment", fontsize=10, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
    panels[0].set_xlabel(f"{method} of both together", fontsize=8)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
