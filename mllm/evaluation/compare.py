"""Two sets of answers to the same questions: who is better in which domain, and whether that could be chance."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mllm.evaluation.answers import Answer
from mllm.evaluation.graded import Graded, check_paired, difference, grade
from mllm.evaluation.intervals import RESAMPLES
from mllm.evaluation.recipe import Recipe
from mllm.evaluation.significance import bootstrap_p, holm, mcnemar_p
from mllm.evaluation.tables import Titled, markdown, percent, signed


def compare_answers(
    first: Sequence[Answer],
    second: Sequence[Answer],
    *,
    names: tuple[str, str] = ("A", "B"),
    recipes: tuple[Recipe | None, Recipe | None] = (None, None),
    seed: int = 0,
) -> dict:
    """Second minus first, paired by question.

    Returns:
        `domains → name → {n, first, second, difference, ci_low, ci_high, first_better, second_better, bootstrap_p,
        mcnemar_p, bootstrap_p_holm, mcnemar_p_holm}`; `mean` over domains, without what is counted in rows;
        `names`, `recipes`, `notes`. Scores are in [0, 1], intervals 95 % and resampled by picture.

    Raises:
        UserError: nothing is graded, or the questions are not the same.
    """
    graded = dict(zip(names, (_sorted(grade(first)), _sorted(grade(second))), strict=True))
    check_paired(graded)
    before, after = graded.values()
    gained = after.minus(before)
    domains, resampled = {}, []
    for domain in before.groups("domains"):
        resampled.append(gained.part("domains", domain).resampled(seed, domain))
        parts = (part.part("domains", domain) for part in (before, after))
        domains[domain] = _compare_domain(*parts, resampled[-1])
    for test in ("bootstrap_p", "mcnemar_p"):
        for figures, p in zip(domains.values(), holm([each[test] for each in domains.values()]), strict=True):
            figures[f"{test}_holm"] = p
    mean = {key: float(np.mean([each[key] for each in domains.values()])) for key in ("first", "second")}
    means_M = np.mean(resampled, axis=0)
    mean |= difference(mean["second"] - mean["first"], means_M) | {"bootstrap_p": bootstrap_p(means_M)}
    return {
        "names": list(names),
        "domains": domains,
        "mean": mean | {"n": len(before.rows)},
        "recipes": {name: recipe.to_json() for name, recipe in zip(names, recipes, strict=True) if recipe},
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "level": 0.95, "unit": "picture"},
        "notes": _notes(dict(zip(names, recipes, strict=True))),
    }


def _sorted(graded: Graded) -> Graded:
    """Files may hold the same answers in another order."""
    order = sorted(range(len(graded.rows)), key=lambda index: _key(graded.rows[index]))
    return Graded([graded.rows[index] for index in order], graded.scores[order])


def _key(row: Answer) -> tuple[str, str, str]:
    return row.source, row.id, row.question


def _compare_domain(before: Graded, after: Graded, means_M: np.ndarray) -> dict:
    gained = after.scores - before.scores
    first_better, second_better = int((gained < 0).sum()), int((gained > 0).sum())
    return {
        "n": len(before.rows),
        "first": float(before.scores.mean()),
        "second": float(after.scores.mean()),
        **difference(gained.mean(), means_M),
        "first_better": first_better,
        "second_better": second_better,
        "bootstrap_p": bootstrap_p(means_M),
        "mcnemar_p": mcnemar_p(first_better, second_better),
    }


def _notes(recipes: Mapping[str, Recipe | None]) -> list[str]:
    """Where the two were asked or decoded differently."""
    if None in recipes.values():
        return [f"{name}: no recipe beside the answers" for name, recipe in recipes.items() if recipe is None]
    (one, first), (two, second) = ((name, recipe.to_json()) for name, recipe in recipes.items())
    return [
        f"{key} differs: {one} {first[key] or 'unknown'}, {two} {second[key] or 'unknown'}"
        for key in first
        if key != "id" and first[key] != second[key]
    ]


# -- telling ---------------------------------------------------------------------------------------------------------

LEGEND = (
    "Per cent, with 95 % bootstrap intervals over pictures. only: questions on which that one scores higher. p: "
    "two-sided; bootstrap by picture, McNemar exact by question (the sign test where scores are graded). Holm: "
    "adjusted for the number of domains."
)


def comparison_tables(comparison: dict) -> Iterator[Titled]:
    """One table, as text."""
    one, two = comparison["names"]
    heads = ["domain", "n", one, two, f"{two} − {one}", "bootstrap p (Holm)", f"only {one} / {two}", "McNemar p (Holm)"]
    lines = comparison["domains"] | {"mean": comparison["mean"]}
    yield f"{two} against {one}", heads, [_line(domain, figures) for domain, figures in lines.items()]


def _line(title: str, figures: dict) -> list[str]:
    counts = f"{figures['first_better']} / {figures['second_better']}" if "mcnemar_p" in figures else "–"
    return [
        title, str(figures["n"]), percent(figures["first"]), percent(figures["second"]), signed(figures),
        _tested(figures, "bootstrap_p"), counts, _tested(figures, "mcnemar_p"),
    ]  # fmt: skip


def _tested(figures: dict, test: str) -> str:
    """A p value, and in brackets the adjusted one; the mean is one question, so there is nothing to adjust for."""
    if test not in figures:
        return "–"
    adjusted = f" ({_p(figures[f'{test}_holm'])})" if f"{test}_holm" in figures else ""
    return _p(figures[test]) + adjusted


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def comparison_notes(comparison: dict) -> list[str]:
    return [LEGEND, *comparison["notes"]]


def write_comparison(comparison: dict, folder: Path) -> None:
    """compare.json and compare.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(comparison, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = markdown("Comparison", comparison_tables(comparison), comparison_notes(comparison))
    (folder / "compare.md").write_text(text, encoding="utf-8")
