"""Several regimes in one table: a line for each summary below a folder."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from mllm.common.errors import UserError
from mllm.evaluation.tables import markdown, print_tables, signed
from studies.conflict.arms import GROUPS
from studies.conflict.report import README, SINGLE, SUMMARY, ratio, sentences

NOTE = (
    "Mean of domains. conflict: each domain's own LoRA minus LoRA on the mix, points with 95 % intervals over seeds "
    "and pictures. recovery: what an arm gets back of it, told only where the interval lies above zero."
)


def report_all(folder: Path, console: Console) -> Path:
    """Writes README.md over all summaries in the folder's folders. Raises UserError where there are none."""
    paths = sorted(folder.glob(f"*/**/{SUMMARY}"))
    if not paths:
        raise UserError(
            f"{folder}: no {SUMMARY} in any folder below it. Give the folder that holds the studies' run.out."
        )
    summaries = {path.parent.relative_to(folder).as_posix(): json.loads(path.read_text("utf-8")) for path in paths}
    table = "Regimes", *_table(summaries)
    said = [f"[{name}]({name}/{README}): {' '.join(sentences(summary))}" for name, summary in summaries.items()]
    path = folder / README
    path.write_text(markdown("Conflict, regime by regime", [table], [NOTE, *said]), encoding="utf-8")
    print_tables([table], [NOTE], console)
    return path


def _table(summaries: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    mains = [arm for arm in GROUPS["main"] if any(arm in summary["recovery"] for summary in summaries.values())]
    heads = ["regime", "seeds", "conflict", "hurts", "best arm", *(f"recovery, {arm}" for arm in mains)]
    return heads, [_line(summary, mains) for summary in summaries.values()]


def _line(summary: dict[str, Any], mains: list[str]) -> list[str]:
    conflict, recovery = summary["conflict"], summary["recovery"]
    if conflict is None:
        return [summary["regime"], str(len(summary["seeds"])), f"no arm {SINGLE}", *["–"] * (2 + len(mains))]
    known = {arm: each["mean"] for arm, each in recovery.items() if each["mean"] is not None}
    answers = [arm for arm in known if not summary["arms"][arm]["is_control"]]
    best = max(answers, key=lambda arm: known[arm]["recovery"], default=None)
    return [
        summary["regime"],
        str(len(summary["seeds"])),
        signed(conflict["mean"]),
        "yes" if summary["hurts"]["mean"] else "not shown",
        "–" if best is None else f"{best} {ratio(known[best])}",
        *(ratio(known.get(arm)) for arm in mains),
    ]
