"""Scores of several arms side by side: per domain and source, with intervals, beside what a blind guesser gets.

An arm is a model as answered by it: {"answers": rows, "blanked": rows of the same model with the pictures blanked or
None, "routing": what RoutingStats.to_json() gives or None, "recipe": what the answers are answers to}.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from mllm.data.conversation import Conversation
from mllm.evaluation.answers import Answer, write_answers
from mllm.evaluation.baseline import BlindBaseline
from mllm.evaluation.figures import figures_of
from mllm.evaluation.graded import LEVELS, Graded, check_paired, difference, grade
from mllm.evaluation.intervals import RESAMPLES, interval
from mllm.evaluation.page import write_page
from mllm.evaluation.picture import draw_report
from mllm.evaluation.recipe import Recipe
from mllm.evaluation.tables import markdown, remarks, report_tables


class Arm(TypedDict):
    """What `build_report` is given of each arm."""

    answers: Sequence[Answer]
    blanked: NotRequired[Sequence[Answer] | None]
    routing: NotRequired[dict | None]
    recipe: NotRequired[Recipe | None]


def build_report(arms: Mapping[str, Arm], train_rows: Iterable[Conversation], *, seed: int = 0) -> dict:
    """Everything the tables, the picture and report.json show.

    `arms → name → domains | sources → group → {n, score, ci_low, ci_high, blind, blanked}`, and `mean` with the same
    keys: the plain mean over domains, so that a large domain does not outvote a small one. Scores are in [0, 1],
    intervals 95 %. `blind` is None without training rows, `blanked` without blanked answers.
    `arms → name → figures → source` holds what a benchmark reports beside the mean, see `mllm.evaluation.figures`.
    `arms → name → recipe` is the id of the recipe that `recipes → id` spells out.
    `differences → arm → earlier arm → domains | sources → group → {difference, ci_low, ci_high}` are paired by row.

    Raises:
        UserError: no graded rows, or arms that did not answer the same questions in the same order.
    """
    graded = {name: grade(arm["answers"]) for name, arm in arms.items()}
    blanked = {name: grade(arm["blanked"]) if arm.get("blanked") else None for name, arm in arms.items()}
    check_paired(graded)
    blind = _guessed(BlindBaseline(train_rows), next(iter(graded.values())).rows)
    recipes = {name: arm["recipe"] for name, arm in arms.items() if arm.get("recipe")}
    return {
        "arms": {
            name: _summarise(graded[name], blind, blanked[name], seed)
            | {"figures": figures_of(graded[name].rows)}
            | ({"recipe": recipes[name].id} if name in recipes else {})
            for name in arms
        },
        "differences": {
            name: {earlier: _compare(graded[name], graded[earlier], seed) for earlier in list(arms)[:position]}
            for position, name in enumerate(arms)
            if position
        },
        "routing": {name: arm["routing"] for name, arm in arms.items() if _is_routed(arm)},
        "recipes": {recipe.id: recipe.to_json() for recipe in recipes.values()},
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "level": 0.95, "unit": "picture"},
        "notes": _notes(arms, graded, blanked),
    }


def _guessed(blind: BlindBaseline, rows: list[Answer]) -> Graded | None:
    guesses = [blind.score(row) for row in rows]
    return None if None in guesses else Graded(rows, np.array(guesses))


def _is_routed(arm: Arm) -> bool:
    return bool(arm.get("routing") and arm["routing"]["shares"])


def _summarise(graded: Graded, blind: Graded | None, blanked: Graded | None, seed: int) -> dict:
    summary: dict = {}
    for level in LEVELS:
        summary[level], resampled = {}, []
        for group in graded.groups(level):
            part = graded.part(level, group)
            resampled.append(part.resampled(seed, group))
            summary[level][group] = _figures(
                len(part.rows),
                part.scores.mean(),
                resampled[-1],
                blind=_mean_score(blind, level, group),
                blanked=_mean_score(blanked, level, group),
            )
        if level == "domains":
            summary["mean"] = _mean_over(list(summary[level].values()), resampled)
    return summary


def _mean_score(graded: Graded | None, level: str, group: str) -> float | None:
    part = graded.part(level, group) if graded else None
    return float(part.scores.mean()) if part and part.rows else None


def _figures(n: int, score: float, means: np.ndarray, *, blind: float | None, blanked: float | None) -> dict:
    low, high = interval(means)
    return {"n": n, "score": float(score), "ci_low": low, "ci_high": high, "blind": blind, "blanked": blanked}


def _mean_over(domains: list[dict], resampled: list[np.ndarray]) -> dict:
    def mean(key: str) -> float | None:
        values = [figures[key] for figures in domains]
        return None if None in values else float(np.mean(values))

    n = sum(figures["n"] for figures in domains)
    return _figures(n, mean("score"), np.mean(resampled, axis=0), blind=mean("blind"), blanked=mean("blanked"))


def _compare(graded: Graded, earlier: Graded, seed: int) -> dict:
    """Paired differences: each row's score minus the same row's under the earlier arm."""
    gained = graded.minus(earlier)
    comparison: dict = {}
    for level in LEVELS:
        comparison[level], resampled = {}, []
        for group in gained.groups(level):
            part = gained.part(level, group)
            resampled.append(part.resampled(seed, group))
            comparison[level][group] = difference(part.scores.mean(), resampled[-1])
        if level == "domains":
            means = [figures["difference"] for figures in comparison[level].values()]
            comparison["mean"] = difference(np.mean(means), np.mean(resampled, axis=0))
    return comparison


def _notes(arms: Mapping[str, Arm], graded: Mapping[str, Graded], blanked: Mapping[str, Graded | None]) -> list[str]:
    """What a reader of the tables would otherwise not know."""
    notes = []
    for name, arm in arms.items():
        if left_out := len(arm["answers"]) - len(graded[name].rows):
            notes.append(f"{name}: {left_out} rows that are not graded were left out")
        if blanked[name] and len(blanked[name].rows) < len(graded[name].rows):
            notes.append(f"{name}: blanked was scored on {len(blanked[name].rows)} of {len(graded[name].rows)} rows")
        if _is_routed(arm):
            notes.append(_routing_note(name, arm["routing"]))
    return notes


def _routing_note(name: str, routing: dict) -> str:
    told = {key.removeprefix("routing/"): value for key, value in routing["summary"].items()}
    domain, modality = (
        f"{told[f'mi_{of}']:.2f} nats of its token's {of} ({100 * told[f'mi_{of}_ratio']:.0f} % of all there is)"
        for of in ("domain", "modality")
    )
    dead = f"{told['dead_experts']:.0f} experts in {len(routing['layers'])} layers took no token"
    return f"{name}: a pick tells {domain} and {modality}; {dead}."


# -- files -----------------------------------------------------------------------------------------------------------


def write_report(report: dict, arms: Mapping[str, Arm], folder: str | Path) -> Path:
    """Writes report.json, .md, .png and .html and answers/<arm>.jsonl (and <arm>.blanked.jsonl); returns the folder.

    report.json comes last and at once, so that where it is the rest is whole.
    """
    folder = Path(folder)
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    for name, arm in arms.items():
        recipe = arm.get("recipe")
        write_answers(folder / "answers" / f"{name}.jsonl", arm["answers"], model_id=name, recipe=recipe)
        if blanked := arm.get("blanked"):
            unseen = recipe and recipe.blanked()
            path = folder / "answers" / f"{name}.blanked.jsonl"
            write_answers(path, blanked, model_id=f"{name} (blanked)", recipe=unseen)
    text = markdown("Scores\n\n![scores per domain](report.png)", report_tables(report), remarks(report))
    (folder / "report.md").write_text(text, encoding="utf-8")
    draw_report(report, folder / "report.png")
    write_page(report, arms, folder / "report.html")
    unfinished = folder / "report.json.part"
    unfinished.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / "report.json")
    return folder
