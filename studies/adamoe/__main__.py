"""Runs a part of the study, as far as time allows, and reports what is there; see the package's docstring."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the parts run side by side, a core each

import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from mllm.common.console import quieten
from studies.adamoe.adapters import AdapterStudy
from studies.adamoe.native import NativeStudy
from studies.adamoe.report import read_part, write_report
from studies.adamoe.runs import run_part
from studies.runner import RESULTS, RunFolder

FOLDER = RESULTS / "adamoe"
console = Console(width=None if sys.stdout.isatty() else 130)  # a log has no width of its own


def main(
    part: Annotated[Literal["a", "b", "report"], typer.Option(help="Adapters, native, or just the report.")],
    seeds: Annotated[int, typer.Option(help="Paired seeds, from 0 on.")] = 5,
    limit_minutes: Annotated[float, typer.Option(help="Start no run that would end later than this.")] = 45.0,
    out: Annotated[Path, typer.Option(help="Where results go; runs are kept in its folder runs/.")] = FOLDER,
) -> None:
    """Train and measure every arm for every seed; runs that are there already, by the same recipe, are passed over."""
    quieten()
    torch.set_num_threads(1)
    studies = {study.part: study for study in (AdapterStudy(), NativeStudy())}
    runs = RunFolder(out / "runs")
    if part != "report":
        run_part(studies[part], runs, seeds, console, limit_minutes=limit_minutes)
    results = [read_part(study, runs, seeds) for study in studies.values()]
    results = [result for result in results if result is not None]
    if not results:
        console.print("No seed is complete yet: run a part first, or go on with it.")
        return
    write_report(results, out, console)


if __name__ == "__main__":
    typer.run(main)
