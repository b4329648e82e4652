"""Runs a part of the study, as far as time allows, and reports what is there; see the package's docstring."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from mllm.common.console import quieten
from mllm.evaluation.tables import markdown, print_tables
from studies.roma.analysis import WHERE, analyse
from studies.roma.arms import ARMS, FEW_TRIALS, RIVALS, TRIES, Arm
from studies.roma.llava import LlavaPart
from studies.roma.native import MisroutedPart, NativePart
from studies.roma.runs import finished, run_part
from studies.runner import RESULTS, RunFolder

PARTS = {"native": ARMS, "misrouted": RIVALS, "miniworld": FEW_TRIALS, "real": FEW_TRIALS}
NATIVE = {"native": NativePart, "misrouted": MisroutedPart}
console = Console(width=None if sys.stdout.isatty() else 130)


def main(
    part: Annotated[
        Literal["native", "misrouted", "miniworld", "real", "report"], typer.Option(help="Which, or just the report.")
    ],
    base: Annotated[str, typer.Option(help="Base model of a LLaVA part.")] = "miniworld",
    adapter: Annotated[Path | None, typer.Option(help="Its trained MoLE adapter.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with train.json and test.json.")] = None,
    seeds: Annotated[int, typer.Option(help="Paired seeds, from 0 on.")] = 5,
    tries: Annotated[bool, typer.Option("--tries", help="What might make it work, after the named arms.")] = False,
    limit_minutes: Annotated[float, typer.Option(help="Start no run that would end later than this.")] = 45.0,
    out: Annotated[Path, typer.Option(help="Where results go; runs are kept in its folder runs/.")] = RESULTS / "roma",
) -> None:
    """Align every arm for every seed and measure it; what is there already, by the same recipe, is passed over."""
    quieten()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    runs = RunFolder(out / "runs")
    arms = TRIES if tries else PARTS.get(part, ())
    if part in NATIVE:
        run_part(NATIVE[part](), arms, runs, seeds, console, limit_minutes=limit_minutes)
    elif part != "report":
        if adapter is None or data is None:
            raise typer.BadParameter(f"--part {part} needs --adapter and --data.")
        run_part(LlavaPart(part, base, adapter, data), arms, runs, seeds, console, limit_minutes=limit_minutes)
    report(runs, out)


def report(runs: RunFolder, out: Path) -> None:
    """Tables of every part with a complete seed, printed and written with the figures."""
    tables, figures = [], {}
    for name, named in PARTS.items():
        seeds = complete(runs, name, named)
        if seeds:
            figures[name] = analyse(
                {arm.name: [finished(runs, name, arm.name, seed) for seed in sorted(seeds)] for arm in named}
            )
            tables += part_tables(name, figures[name])
        seeds = complete(runs, name, TRIES) & seeds
        if seeds:
            beside = [arm for arm in named if arm.name in ("base", "ce", "true")]
            arms = {
                arm.name: [finished(runs, name, arm.name, seed) for seed in sorted(seeds)] for arm in (*beside, *TRIES)
            }
            figures[f"{name}_tries"] = analyse(arms)
            tables.append(tries_table(name, figures[f"{name}_tries"]))
    if not tables:
        console.print("No seed is complete yet: run a part first, or go on with it.")
        return
    notes = [
        "Per cent of test questions right to the letter, mean over families and seeds; 95 % t-intervals over seeds."
    ]
    print_tables(tables, notes)
    (out / "README.md").write_text(markdown("Router alignment: the study", tables, notes), encoding="utf-8")
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def complete(runs: RunFolder, part: str, arms: Sequence[Arm]) -> set[int]:
    """Seeds for which every arm is there."""
    return {seed for seed in range(100) if all(runs.record(f"{part}-{arm.name}-s{seed}") for arm in arms)}


def part_tables(name: str, figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Arms, then the claim."""
    heads = ["arm", *(f"{where}{what}" for where in WHERE for what in ("", " − base")), "nearest / random, after"]
    rows = []
    for arm, each in figures["arms"].items():
        cells = [(f"{100 * each[where]['score']:.2f}", points(each[where]["to_base"])) for where in WHERE]
        rows.append([arm, *(text for pair in cells for text in pair), f"{each['consistency']['after']:.3f}"])
    claim = [
        [f"true − {rival}", where, points(test), f"{test['p_holm']:.3f}", f"{test['mcnemar_p']:.3f}"]
        for where, tests in figures["claim"].items()
        for rival, test in tests.items()
    ]
    title = f"Part {name}, {figures['seeds']} seeds"
    return [
        (title, heads, rows),
        (f"{title}: the claim", ["difference", "families", "points", "p (Holm)", "McNemar"], claim),
    ]


def tries_table(name: str, figures: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Each try against tuning by the answers' loss alone; no correction for their number, since they are no claim."""
    heads = ["try", *(f"{where} − {rival}" for where in WHERE for rival in ("base", "ce")), "nearest / random, after"]
    rows = [
        [
            arm,
            *(points(each[where][f"to_{rival}"]) for where in WHERE for rival in ("base", "ce")),
            f"{each['consistency']['after']:.3f}",
        ]
        for arm, each in figures["arms"].items()
        if arm not in ("base", "ce")
    ]
    return f"Part {name}, {figures['seeds']} seeds: tries", heads, rows


def points(test: dict[str, float]) -> str:
    """A difference in percentage points with its interval."""
    return f"{100 * test['difference']:+.2f} [{100 * test['ci_low']:+.2f}, {100 * test['ci_high']:+.2f}]"


if __name__ == "__main__":
    typer.run(main)
