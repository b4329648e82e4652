"""`python -m studies.conflict CONFIG.yaml section.key=value …`: runs what is not there yet, then reports.

Started a second time beside the first, both share the work.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

DESCRIPTION = (
    "Measure what mixing domains costs, and which arm gets it back: run what is not there yet, then report. Started a"
    " second time beside the first, both share the work."
)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after a mistake of the user's, said in words on stderr."""
    parser = argparse.ArgumentParser(prog="mllm conflict", description=DESCRIPTION)
    parser.add_argument("config", type=Path, nargs="?", help="YAML of one regime, or conflict, conflict_real")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings put over the file's")
    parser.add_argument("--report", action="store_true", help="only report, from the finished runs in run.out")
    parser.add_argument("--report-all", type=Path, metavar="FOLDER", help="one table over all studies in a folder")
    options = parser.parse_intermixed_args(arguments)
    if (options.config is None) == (options.report_all is None):
        parser.error("give a config, or --report-all FOLDER")
    from mllm.common.errors import UserError  # imports of seconds, after --help

    console = Console(width=None if sys.stdout.isatty() else 160)  # a log has no width of its own
    try:
        if options.report_all is not None:
            from studies.conflict.regimes import report_all

            report_all(options.report_all, console)
        else:
            study(options.config, options.overrides, console, only_report=options.report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def study(path: Path, overrides: list[str], console: Console, *, only_report: bool) -> None:
    """Runs and reports one regime. Raises UserError for whatever the user can mend."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed, which train.parts needs, looks for itself
    from mllm.common.console import quieten
    from studies.conflict.config import load_conflict_config
    from studies.conflict.report import read_study, report, write_facts
    from studies.conflict.work import Worker, work
    from studies.runner import RunFolder

    quieten()
    config = load_conflict_config(path, overrides)
    runs = RunFolder(config.run.out / "runs")
    if only_report:
        report(read_study(config), runs, console)
        return
    worker = Worker(config)
    write_facts(worker.study, config.run.out)
    work(worker, runs, console, limit_minutes=config.run.limit_minutes)
    report(worker.study, runs, console)


if __name__ == "__main__":
    sys.exit(main())
