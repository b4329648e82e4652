"""Runs a part of the study, as far as time allows, and reports what is there; see the package's docstring."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the parts run side by side, a core each

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mllm.console import quieten
from studies.adamoe.adapters import AdapterStudy
from studies.adamoe.native import NativeStudy
from studies.adamoe.report import read_part, write_report
from studies.adamoe.runs import RunFolder, Study
from studies.runner import RESULTS

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
        carry_out(studies[part], runs, range(seeds), limit_seconds=60 * limit_minutes)
    results = [read_part(study, runs, range(seeds)) for study in studies.values()]
    results = [result for result in results if result is not None]
    if not results:
        console.print("No seed is complete yet: run a part first, or go on with it.")
        return
    write_report(results, out, console)


def carry_out(study: Study, runs: RunFolder, seeds: Sequence[int], *, limit_seconds: float) -> int:
    """Seed by seed, so that what is there when time is over is paired. Returns how many runs were made."""
    due = [(arm, seed) for seed in seeds for arm in study.arms if not runs.is_done(study, arm, seed)]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    began = time.monotonic()
    if due:
        study.prepare()
    started, made = time.monotonic(), 0
    with Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=1800) as bar:
        task = bar.add_task(f"part {study.part}", total=len(due), rate="")
        for arm, seed in due:
            now = time.monotonic()
            if now - began + (now - started) / max(made, 1) > limit_seconds:
                console.print(f"Time is over with {len(due) - made} runs left; the same command goes on with them.")
                break
            bar.update(task, description=f"part {study.part}: {arm.name}, seed {seed}")
            clock = time.process_time()
            measured = study.run(arm, seed)
            runs.keep(study, arm, seed, measured, time.process_time() - clock)
            made += 1
            rate = (time.monotonic() - started) / made
            bar.update(task, advance=1, rate=f"{rate:.0f} s a run")
            shown = {name: round(measured.figures[name], 4) for name in ("load", "loss", "right")}
            console.print(f"{arm.name} seed {seed}: {shown}, {(len(due) - made) * rate / 60:.0f} min to go")
    return made


if __name__ == "__main__":
    typer.run(main)
