"""Scores of several arms side by side: per domain and source, with intervals, beside what a blind guesser gets.

An arm is a model as answered by it: {"answers": rows, "blanked": rows of the same model with the pictures blanked or
None, "routing": what RoutingStats.to_json() gives or None}.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mllm.data.conversation import Conversation
from mllm.errors import UserError
from mllm.evaluation.answers import Answer, write_answers
from mllm.evaluation.baseline import BlindBaseline
from mllm.evaluation.intervals import RESAMPLES, bootstrap_means, interval
from mllm.evaluation.picture import draw_report

LEVELS = {"domains": "domain", "sources": "source"}


class Arm(TypedDict):
    """What `build_report` is given of each arm."""

    answers: Sequence[Answer]
    blanked: NotRequired[Sequence[Answer] | None]
    routing: NotRequired[dict | None]


@dataclass(frozen=True)
class _Graded:
    """Rows with their scores, in the same order."""

    rows: list[Answer]
    scores: np.ndarray

    def part(self, level: str, group: str) -> "_Graded":
        chosen = [index for index, row in enumerate(self.rows) if getattr(row, LEVELS[level]) == group]
        return _Graded([self.rows[index] for index in chosen], self.scores[chosen])


def build_report(arms: Mapping[str, Arm], train_rows: Iterable[Conversation], *, seed: int = 0) -> dict:
    """Everything the tables, the picture and report.json show.

    `arms → name → domains | sources → group → {n, score, ci_low, ci_high, blind, blanked}`, and `mean` with the same
    keys: the plain mean over domains, so that a large domain does not outvote a small one. Scores are in [0, 1],
    intervals 95 %. `blind` is None without training rows, `blanked` without blanked answers.
    `differences → arm → earlier arm → domains | sources → group → {difference, ci_low, ci_high}` are paired by row.

    Raises:
        UserError: no graded rows, or arms that did not answer the same questions in the same order.
    """
    blind = BlindBaseline(train_rows)
    graded = {name: _grade(arm["answers"]) for name, arm in arms.items()}
    blanked = {name: _grade(arm["blanked"]) if arm.get("blanked") else None for name, arm in arms.items()}
    _check_paired(graded)
    first = next(iter(graded.values()))
    guesses = [blind.score(row) for row in first.rows]
    blind_graded = None if None in guesses else _Graded(first.rows, np.array(guesses))
    return {
        "arms": {name: _summarise(graded[name], blind_graded, blanked[name], seed) for name in arms},
        "differences": {
            name: {earlier: _compare(graded[name], graded[earlier], seed) for earlier in list(arms)[:position]}
            for position, name in enumerate(arms)
            if position
        },
        "routing": {name: arm["routing"] for name, arm in arms.items() if _is_routed(arm)},
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "level": 0.95, "unit": "picture"},
        "notes": _notes(arms, graded, blanked),
    }


def _is_routed(arm: Arm) -> bool:
    return bool(arm.get("routing") and arm["routing"]["shares"])


def _grade(answers: Sequence[Answer]) -> _Graded:
    rows = [row for row in answers if row.graded]
    return _Graded(rows, np.array([row.grade() for row in rows]))


def _check_paired(graded: Mapping[str, _Graded]) -> None:
    (first_name, first), *others = graded.items()
    if not first.rows:
        raise UserError("there is no graded row to report on: every row's metric is 'not_graded', or there are none")
    for name, other in others:
        if len(other.rows) != len(first.rows):
            raise UserError(f"arm '{name}' has {len(other.rows)} graded answers, '{first_name}' {len(first.rows)}")
        for one, two in zip(first.rows, other.rows, strict=True):
            if (one.source, one.id, one.question) != (two.source, two.id, two.question):
                raise UserError(
                    f"arms must answer the same questions in the same order: where '{first_name}' has row '{one.id}' "
                    f"of {one.source}, '{name}' has row '{two.id}' of {two.source}"
                )


def _groups(rows: Iterable[Answer], level: str) -> list[str]:
    return sorted({getattr(row, LEVELS[level]) for row in rows})


def _resampled(part: _Graded, seed: int, group: str) -> np.ndarray:
    """Every group has a random stream of its own, so that its interval does not depend on what else is reported."""
    rng = np.random.default_rng([seed, zlib.crc32(group.encode())])
    return bootstrap_means(part.scores, [row.picture for row in part.rows], rng=rng)


def _summarise(graded: _Graded, blind: _Graded | None, blanked: _Graded | None, seed: int) -> dict:
    summary: dict = {}
    for level in LEVELS:
        summary[level], resampled = {}, []
        for group in _groups(graded.rows, level):
            part = graded.part(level, group)
            resampled.append(_resampled(part, seed, group))
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


def _mean_score(graded: _Graded | None, level: str, group: str) -> float | None:
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


def _compare(graded: _Graded, earlier: _Graded, seed: int) -> dict:
    """Paired differences: each row's score minus the same row's under the earlier arm."""
    gained = _Graded(graded.rows, graded.scores - earlier.scores)
    comparison: dict = {}
    for level in LEVELS:
        comparison[level], resampled = {}, []
        for group in _groups(gained.rows, level):
            part = gained.part(level, group)
            resampled.append(_resampled(part, seed, group))
            comparison[level][group] = _difference(part.scores.mean(), resampled[-1])
        if level == "domains":
            means = [figures["difference"] for figures in comparison[level].values()]
            comparison["mean"] = _difference(np.mean(means), np.mean(resampled, axis=0))
    return comparison


def _difference(value: float, means: np.ndarray) -> dict:
    low, high = interval(means)
    return {"difference": float(value), "ci_low": low, "ci_high": high}


def _notes(arms: Mapping[str, Arm], graded: Mapping[str, _Graded], blanked: Mapping[str, _Graded | None]) -> list[str]:
    """What a reader of the tables would otherwise not know."""
    notes = []
    for name, arm in arms.items():
        if left_out := len(arm["answers"]) - len(graded[name].rows):
            notes.append(f"{name}: {left_out} rows that are not graded were left out")
        if blanked[name] and len(blanked[name].rows) < len(graded[name].rows):
            notes.append(f"{name}: blanked was scored on {len(blanked[name].rows)} of {len(graded[name].rows)} rows")
    return notes


# -- tables ----------------------------------------------------------------------------------------------------------


def report_tables(report: dict) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, column heads, rows) of each table, as text; scores in per cent."""
    yield "Scores per domain", *_score_table(report, "domains")
    yield "Scores per source", *_score_table(report, "sources")
    if report["differences"]:
        yield "Paired differences per domain", *_difference_table(report)
    for name, routing in report["routing"].items():
        yield f"Share of tokens per expert, {name}", *_routing_table(routing)


def _score_table(report: dict, level: str) -> tuple[list[str], list[list[str]]]:
    arms = report["arms"]
    with_blanked = [name for name, arm in arms.items() if arm["mean"]["blanked"] is not None]
    heads = [LEVELS[level], "n", *arms, "blind"]
    heads += [f"blanked ({' / '.join(with_blanked)})"] if with_blanked else []

    def line(title: str, figures: dict[str, dict]) -> list[str]:
        any_arm = next(iter(figures.values()))
        scores = [_with_interval(arm["score"], arm) for arm in figures.values()]
        blanked = [" / ".join(_percent(figures[name]["blanked"]) for name in with_blanked)] if with_blanked else []
        return [title, str(any_arm["n"]), *scores, _percent(any_arm["blind"]), *blanked]

    groups = next(iter(arms.values()))[level]
    rows = [line(group, {name: arm[level][group] for name, arm in arms.items()}) for group in groups]
    if level == "domains":
        rows.append(line("mean", {name: arm["mean"] for name, arm in arms.items()}))
    return heads, rows


def _difference_table(report: dict) -> tuple[list[str], list[list[str]]]:
    pairs = {
        f"{name} − {earlier}": comparison
        for name, against in report["differences"].items()
        for earlier, comparison in against.items()
    }
    groups = next(iter(pairs.values()))["domains"]
    rows = [[group, *(_signed(pair["domains"][group]) for pair in pairs.values())] for group in groups]
    return ["domain", *pairs], [*rows, ["mean", *(_signed(pair["mean"]) for pair in pairs.values())]]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _with_interval(value: float, figures: dict, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} [{100 * figures['ci_low']:{sign}.1f}, {100 * figures['ci_high']:{sign}.1f}]"


def _signed(figures: dict) -> str:
    return _with_interval(figures["difference"], figures, sign="+")


def _routing_table(routing: dict) -> tuple[list[str], list[list[str]]]:
    """Mean over layers; the layers one by one are in the picture and in report.json."""
    means = {domain: np.mean(list(by_layer.values()), axis=0) for domain, by_layer in routing["shares"].items()}
    num_experts = len(next(iter(means.values())))
    heads = ["domain", *(f"expert {expert}" for expert in range(num_experts))]
    return heads, [[domain, *map(_percent, shares)] for domain, shares in means.items()]


def print_report(report: dict, console: Console | None = None) -> None:
    """The tables on the terminal."""
    console = console or Console()
    for title, heads, rows in report_tables(report):
        console.print(_terminal_table(title, heads, rows, console))
    for note in [_LEGEND, *report["notes"]]:
        console.print(Text(note, style="dim"))


def _terminal_table(title: str, heads: list[str], rows: list[list[str]], console: Console) -> Table:
    """One line a row where the terminal is wide enough, else intervals and alternatives go under one another."""
    table = _rich_table(title, heads, rows)
    if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
        return table
    narrow = [[re.sub(r" (?=[\[(/])", "\n", cell) for cell in line] for line in [heads, *rows]]
    return _rich_table(title, narrow[0], narrow[1:], padding=0)


def _rich_table(title: str, heads: list[str], rows: list[list[str]], padding: int = 1) -> Table:
    style = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "padding": (0, padding)}
    table = Table(title=title, pad_edge=False, **style)
    for position, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if position else "left", overflow="fold")
    for row in rows:
        if row[0] == "mean":
            table.add_section()
        table.add_row(*map(Text, row))
    return table


_LEGEND = (
    "Per cent, with 95 % bootstrap intervals over pictures. blind: the commonest training answer to that question. "
    "blanked: the same model with an empty picture."
)


# -- files -----------------------------------------------------------------------------------------------------------


def write_report(report: dict, arms: Mapping[str, Arm], folder: str | Path) -> Path:
    """Writes report.json, report.md, report.png and answers/<arm>.jsonl (and <arm>.blanked.jsonl); returns the folder.

    report.json comes last and at once, so that where it is the rest is whole.
    """
    folder = Path(folder)
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    for name, arm in arms.items():
        write_answers(folder / "answers" / f"{name}.jsonl", arm["answers"], model_id=name)
        if blanked := arm.get("blanked"):
            write_answers(folder / "answers" / f"{name}.blanked.jsonl", blanked, model_id=f"{name} (blanked)")
    (folder / "report.md").write_text(_markdown(report), encoding="utf-8")
    draw_report(report, folder / "report.png")
    unfinished = folder / "report.json.part"
    unfinished.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / "report.json")
    return folder


def _markdown(report: dict) -> str:
    parts = ["# Scores\n\n![scores per domain](report.png)\n"]
    for title, heads, rows in report_tables(report):
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        parts.append(f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join([*parts, *(f"{note}\n" for note in [_LEGEND, *report["notes"]])])
