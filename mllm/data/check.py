"""Reads every row of a mixture before training does, and lists the bad ones."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from mllm.data.images import open_image
from mllm.data.mixture import Mixture
from mllm.data.template import ConversationEncoder
from mllm.errors import UserError


@dataclass(frozen=True)
class BadRow:
    """A row that training would stop at, and why."""

    index: int  # in the mixture
    source: str
    error: str  # names file and row


@dataclass
class CheckReport:
    """What `check_mixture` found. Sizes are known only if it was given an encoder."""

    rows: int
    rows_of_source: dict[str, int]
    bad: list[BadRow] = field(default_factory=list)
    longest: int | None = None  # tokens, image tokens included
    longest_where: str | None = None

    @property
    def ok(self) -> bool:
        return not self.bad

    def __str__(self) -> str:
        lines = [f"{self.rows} rows, {len(self.bad)} bad"]
        bad_of_source = {name: sum(row.source == name for row in self.bad) for name in self.rows_of_source}
        lines += [f"  {name}: {rows} rows, {bad_of_source[name]} bad" for name, rows in self.rows_of_source.items()]
        if self.longest is not None:
            lines.append(f"longest: {self.longest} tokens, {self.longest_where}")
        return "\n".join([*lines, *(row.error for row in self.bad)])

    def write(self, path: str | Path) -> None:
        """Writes the bad rows as JSONL: {index, source, error}."""
        text = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in self.bad)
        Path(path).write_text(text, encoding="utf-8")


def check_mixture(
    mixture: Mixture,
    encoder: ConversationEncoder | None = None,
    decode: bool = True,
    progress: bool = True,
) -> CheckReport:
    """Takes every row as training would and gathers every error.

    Args:
        encoder: also encodes each row, so that too long and unsupervised rows are found.
        decode: also decodes pictures; without this and without encoder they need only exist.
        progress: whether to draw a progress bar.
    """
    check = _RowCheck(mixture, encoder, decode)
    names = mixture.source_of_row
    report = CheckReport(rows=len(mixture), rows_of_source={name: names.count(name) for name in mixture.sources})
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        for index, finding in enumerate(bar.track(check.all(), total=len(mixture))):
            if isinstance(finding, UserError):
                report.bad.append(BadRow(index, names[index], str(finding)))
            elif finding is not None and finding > (report.longest or 0):
                report.longest, report.longest_where = finding, mixture[index].where
    return report


class _RowCheck(Dataset[UserError | int | None]):
    """Row i's error, or else its length in tokens if there is an encoder. Each process decodes a file once."""

    BATCH = 64  # rows a process checks at a time
    ROWS_FOR_PROCESSES = 1000  # fewer are checked before processes have started

    def __init__(self, mixture: Mixture, encoder: ConversationEncoder | None, decode: bool) -> None:
        self.mixture = mixture
        self.encoder = encoder
        self.decode = decode
        self._decoded: set[Path] = set()

    def all(self) -> Iterator[UserError | int | None]:
        reads_files = self.decode or self.encoder is not None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = cores if reads_files and len(self) >= self.ROWS_FOR_PROCESSES else 0
        yield from chain.from_iterable(DataLoader(self, self.BATCH, num_workers=processes, collate_fn=list))

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> UserError | int | None:
        try:
            conversation = self.mixture[index]
            if self.encoder is not None:
                return len(self.encoder.encode(conversation)["input_ids"])
            if self.decode:
                for path in set(conversation.images) - self._decoded:
                    open_image(path, where=conversation.where)
                    self._decoded.add(path)
        except UserError as error:
            return error
        return None
