"""A report as tables: on the terminal, in Markdown, and as text for the page."""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mllm.evaluation.graded import LEVELS
from mllm.evaluation.recipe import describe

_MOST_EXPERT_COLUMNS = 8
Titled = tuple[str, list[str], list[list[str]]]  # title, column heads, rows, all as text


def report_tables(report: dict) -> Iterator[Titled]:
    """(title, column heads, rows) of each table, as text; scores in per cent."""
    yield "Scores per domain", *_score_table(report, "domains")
    yield "Scores per source", *_score_table(report, "sources")
    if any(arm.get("figures") for arm in report["arms"].values()):
        yield "Figures of sets", *_figure_table(report["arms"])
    if report["differences"]:
        yield "Paired differences per domain", *_difference_table(report)
    for name, routing in report["routing"].items():
        yield f"Routing, {name}", *_routing_table(routing)


def _score_table(report: dict, level: str) -> tuple[list[str], list[list[str]]]:
    arms = report["arms"]
    with_blanked = [name for name, arm in arms.items() if arm["mean"]["blanked"] is not None]
    heads = [LEVELS[level], "n", *arms, "blind"]
    heads += [f"blanked ({' / '.join(with_blanked)})"] if with_blanked else []

    def line(title: str, figures: dict[str, dict]) -> list[str]:
        any_arm = next(iter(figures.values()))
        scores = [with_interval(arm["score"], arm) for arm in figures.values()]
        blanked = [" / ".join(percent(figures[name]["blanked"]) for name in with_blanked)] if with_blanked else []
        return [title, str(any_arm["n"]), *scores, percent(any_arm["blind"]), *blanked]

    groups = next(iter(arms.values()))[level]
    rows = [line(group, {name: arm[level][group] for name, arm in arms.items()}) for group in groups]
    if level == "domains":
        rows.append(line("mean", {name: arm["mean"] for name, arm in arms.items()}))
    return heads, rows


def _figure_table(arms: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """What only a set has (F1, acc+, CIDEr-D …) and the mean of each kind of question; arms side by side."""
    named = {name: arm.get("figures") or {} for name, arm in arms.items()}
    keys = dict.fromkeys((source, key) for figures in named.values() for source in figures for key in figures[source])
    return ["source: figure", *arms], [
        [f"{source}: {key}", *(_figure(figures.get(source, {}).get(key)) for figures in named.values())]
        for source, key in keys
    ]


def _figure(figure: dict | None) -> str:
    if figure is None or figure["unit"] == "%":
        return percent(figure and figure["value"])
    return f"{figure['value']:.1f} {figure['unit']}"


def _difference_table(report: dict) -> tuple[list[str], list[list[str]]]:
    pairs = {
        f"{name} − {earlier}": comparison
        for name, against in report["differences"].items()
        for earlier, comparison in against.items()
    }
    groups = next(iter(pairs.values()))["domains"]
    rows = [[group, *(signed(pair["domains"][group]) for pair in pairs.values())] for group in groups]
    return ["domain", *pairs], [*rows, ["mean", *(signed(pair["mean"]) for pair in pairs.values())]]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def with_interval(value: float, figures: dict, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} [{100 * figures['ci_low']:{sign}.1f}, {100 * figures['ci_high']:{sign}.1f}]"


def signed(figures: dict) -> str:
    return with_interval(figures["difference"], figures, sign="+")


def _routing_table(routing: dict) -> tuple[list[str], list[list[str]]]:
    """Means over layers; the layers one by one are in the picture and in report.json."""
    with_nulls = "null" in routing["experts"]
    experts = [expert for expert in routing["experts"] if expert != "null"]
    experts = experts if len(experts) <= _MOST_EXPERT_COLUMNS else []
    heads = ["tokens of", "load", *(["null picks"] if with_nulls else []), "entropy"]

    def line(title: str, figures: dict[str, float], by_layer: dict[str, list[float]]) -> list[str]:
        nulls = [percent(figures["null_share"])] if with_nulls else []
        shares = np.mean(list(by_layer.values()), axis=0)[: len(experts)]
        return [title, f"{figures['load']:.2f}", *nulls, f"{figures['entropy']:.2f}", *map(percent, shares)]

    figures = routing["figures"]
    rows = [line(domain, figures["domain"][domain], shares) for domain, shares in routing["shares"].items()]
    rows += [line(name, figures["modality"][name], shares) for name, shares in routing["modality_shares"].items()]
    return [*heads, *(f"expert {expert}" for expert in experts)], rows


def print_report(report: dict, console: Console | None = None) -> None:
    """The tables on the terminal."""
    print_tables(report_tables(report), remarks(report), console)


def print_tables(tables: Iterable[Titled], notes: Sequence[str], console: Console | None = None) -> None:
    """Any tables on the terminal, notes below."""
    console = console or Console()
    for title, heads, rows in tables:
        console.print(_terminal_table(title, heads, rows, console))
    for note in notes:
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
_ROUTING_LEGEND = (
    "Routing of the questions' tokens, mean over layers. load: experts a token takes. null picks, expert: share of all "
    "picks, in per cent. entropy: of a router's probabilities, in nats."
)


def remarks(report: dict) -> list[str]:
    """What stands below the tables."""
    legends = [_LEGEND, *([_ROUTING_LEGEND] if report["routing"] else [])]
    return [*legends, *report["notes"], *recipe_notes(report)]


def recipe_notes(report: dict) -> list[str]:
    """A line for each recipe, with the arms that followed it."""
    followers = {
        key: ", ".join(name for name, arm in report["arms"].items() if arm.get("recipe") == key)
        for key in report["recipes"]
    }
    return [f"recipe {key} ({followers[key]}): {describe(recipe)}" for key, recipe in report["recipes"].items()]


def markdown(title: str, tables: Iterable[Titled], notes: Sequence[str]) -> str:
    """Tables below a title (and what stands with it), notes at the end."""
    parts = [f"# {title}\n"]
    for head, heads, rows in tables:
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        parts.append(f"## {head}\n\n" + "".join(f"| {' | '.join(_cell(line))} |\n" for line in lines))
    return "\n".join([*parts, *(f"{note}\n" for note in notes)])


def _cell(line: list[str]) -> list[str]:
    """A bar or a line break in a name would end the cell."""
    return [" ".join(text.split()).replace("|", "\\|") for text in line]
