"""Questions to a report: loads each arm in turn, has it answer, and hands the text to ``mllm.evaluation``."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from mllm.build import load
from mllm.console import quieten
from mllm.data.conversation import Conversation
from mllm.data.mixture import load_mixture
from mllm.data.sources import Source
from mllm.errors import UserError
from mllm.evaluation.answers import check_gradable, collect_answers
from mllm.evaluation.report import Arm, build_report, print_report, write_report
from mllm.generate import answer
from mllm.mole import routing_context
from mllm.provenance import provenance
from mllm.routing.stats import RoutingStats


def evaluate_arms(
    model: str,
    adapters: Mapping[str, str | Path | None],
    questions: Path,
    out: Path,
    *,
    train_rows: Path | None = None,
    image_root: Path | None = None,
    blanked: bool = True,
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
) -> dict:
    """Scores one model with each of several adapters on the same questions, prints the tables and writes the report.

    Args:
        adapters: arm name -> adapter folder, None for the model alone; the first arm is what others are compared with.
        train_rows: where the blind baseline learns the commonest answers; without it there is no baseline.
        limit: only the first so many questions of each source.

    Returns:
        The report, as written to ``out/report.json``.

    Raises:
        UserError: questions, pictures, model or adapter cannot be read, or no question has an answer to score by.
    """
    quieten()
    rows = [row for row in Source(questions, image_root=image_root) if row.metric != "not_graded"]
    rows = first_of_each_source(rows, limit)
    check_gradable(rows)
    known = load_mixture(train_rows) if train_rows else []
    for name, adapter in adapters.items():
        if adapter is not None and not Path(adapter).is_dir():  # before the first arm spends an hour answering
            raise UserError(f"arm {name}: no adapter folder {adapter}.")
    arms = {
        name: answer_arm(model, adapter, rows, name=name, blanked=blanked, batch_size=batch_size,
                         max_new_tokens=max_new_tokens)
        for name, adapter in adapters.items()
    }  # fmt: skip
    report = build_report(arms, known)
    report["about"] = {
        "model": str(model),
        "adapters": {name: str(path) for name, path in adapters.items() if path},
        "questions": questions.name,
        "decoding": {"greedy": True, "max_new_tokens": max_new_tokens},
        "measured": provenance(),
    }
    write_report(report, arms, out)
    print_report(report)
    return report


def answer_arm(
    model_path: str,
    adapter: str | Path | None,
    rows: Sequence[Conversation],
    *,
    name: str,
    blanked: bool,
    batch_size: int,
    max_new_tokens: int,
) -> Arm:
    """One arm's answers, with pictures and blanked, and where its experts' tokens went."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load(model_path, adapter=adapter, device=device)
    context, stats = routing_context(model), RoutingStats()
    Console(stderr=True).print(f"[bold]{name}[/]: {len(rows)} questions")

    def answered(blank: bool) -> list:
        texts = answer(
            model, processor, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, blank=blank,
            on_batch=(lambda domains: stats.update(context, domains)) if context and not blank else None,
        )  # fmt: skip
        return collect_answers(rows, texts)

    return Arm(
        answers=answered(blank=False),
        blanked=answered(blank=True) if blanked else None,
        routing=stats.to_json() if context else None,
    )


def first_of_each_source(rows: Sequence[Conversation], limit: int | None) -> list[Conversation]:
    """At most ``limit`` rows a source, in their order. Raises UserError if nothing is left."""
    taken: dict[str, int] = defaultdict(int)
    kept = []
    for row in rows:
        taken[row.source] += 1
        if limit is None or taken[row.source] <= limit:
            kept.append(row)
    if not kept:
        raise UserError("no question to answer: the file has no graded row, or --limit is 0.")
    return kept
