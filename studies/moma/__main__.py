"""Trains and scores what is not there yet, as far as time allows, and reports; see the package's docstring."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from mllm.common.console import quieten
from mllm.common.provenance import provenance
from studies.moma.analysis import analyse, as_markdown, contrasts
from studies.moma.arms import ARMS, DENSE
from studies.moma.picture import draw
from studies.moma.runs import Study, SweepThenSeeds, run_study
from studies.moma.speed import as_table, measure
from studies.runner import RESULTS

SPEED_BATCHES = 1, 4  # of the study's batch


def main(
    image_tokenizer: Annotated[Path, typer.Option(help="Folder of a stage image_tokenizer.")],
    scale: Annotated[
        Literal["smoke", "cpu", "real", "gpu"], typer.Option(help="Size; real: of caption files.")
    ] = "cpu",
    captions: Annotated[list[Path] | None, typer.Option(help="LLaVA JSON with captions, for --scale real.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Where their pictures lie.")] = None,
    seeds: Annotated[int, typer.Option(help="Of every arm.")] = 3,
    main_seeds: Annotated[int, typer.Option(help="Of dense and 4t4i.")] = 5,
    arm: Annotated[list[str] | None, typer.Option(help="Only these arms (and dense).")] = None,
    limit_minutes: Annotated[float, typer.Option(help="Start no run that would end later.")] = 60.0,
    out: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS / "moma",
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure steps a second, arms in turn; leave it alone.")
    ] = False,
    speed_rows: Annotated[
        list[int] | None, typer.Option(help="Rows a step for --speed; else the batch, and four times it.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Of --speed.")] = 20,
    report_only: Annotated[bool, typer.Option("--report-only", help="Tables of what is there.")] = False,
) -> None:
    """Train and score what is not there yet, then report."""
    quieten()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    study = Study(scale, image_tokenizer, out, captions or [], image_root)
    arms = list(ARMS) if not arm else list(dict.fromkeys([DENSE, *arm]))
    if speed:
        sizes = speed_rows or [k * study.scale.batch_rows for k in SPEED_BATCHES]
        by_rows = {rows: measure(study, arms, rows, rounds) for rows in sizes}
        _write(study.folder / "speed.json", provenance() | {"length": study.scale.length, "rows": by_rows})
        Console().print(as_table(by_rows, study.scale.length))
    elif not report_only:
        study.prepare()
        run_study(SweepThenSeeds(study, arms, seeds, main_seeds), Console(), limit_minutes=limit_minutes)
    report(study, arms, max(seeds, main_seeds))


def report(study: Study, arms: list[str], seeds: int) -> None:
    """Tables and a picture of what is complete, printed and written."""
    results, path = analyse(study, arms, seeds), study.folder / "speed.json"
    if not results:
        print("no seed of dense is complete yet")
        return
    speeds = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else {}
    differences = contrasts(study, seeds)
    _write(study.folder / "results.json", provenance() | {"arms": results, "contrasts": differences})
    draw(study, results, study.folder / "study.png")
    page = as_markdown(results, differences, speeds)
    (study.folder / "README.md").write_text(page, encoding="utf-8")
    print(page)


def _write(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
