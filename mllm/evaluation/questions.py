"""The rows of a file that are to be answered and graded."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mllm.common.errors import UserError
from mllm.data.conversation import Conversation
from mllm.data.sources import Source
from mllm.evaluation.answers import check_gradable
from mllm.evaluation.benchmarks import Selection
from mllm.evaluation.metrics import NOT_GRADED


def read_questions(
    path: Path | Selection, *, image_root: Path | None = None, limit: int | None = None, check_files: bool = True
) -> list[Conversation]:
    """The graded rows of a file, or of benchmarks below a folder; at most `limit` of each source.

    Raises:
        UserError: the file or a row of it is bad, nothing is left to answer, or a row could not be graded.
    """
    if isinstance(path, Selection):
        rows = path.read(limit=limit, check_files=check_files)
        check_gradable(rows)
        return rows
    source = Source(path, image_root=image_root, check_files=check_files)
    rows = first_of_each_source([row for row in source if row.metric != NOT_GRADED], limit)
    check_gradable(rows)
    return rows


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
