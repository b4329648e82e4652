"""Reads every row of a mixture before training does, lists the bad ones, and measures the others."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from mllm.common.errors import TooLongError, UserError, printable
from mllm.data.conversation import Conversation
from mllm.data.encoded import BadRow, bad_row
from mllm.data.formats import EmbeddedImage
from mllm.data.images import ImageError, missing_image, open_image
from mllm.data.mixture import Mixture
from mllm.data.overlap import overlap, picture_hash
from mllm.data.sources import NAMED
from mllm.data.template import IGNORED, ConversationEncoder


class Sizes(NamedTuple):
    """A row's tokens; zeros where it could not be encoded."""

    tokens: int = 0  # pictures included, before anything is cut
    image_tokens: int = 0
    supervised: int = 0


NO_SIZES = Sizes()


@dataclass
class CheckReport:
    """What `check_mixture` found. Sizes are known only if an encoder had the pictures too, hashes only if asked for."""

    rows: int
    rows_of_source: dict[str, int]
    bad: list[BadRow] = field(default_factory=list)
    cut: list[BadRow] = field(default_factory=list)  # too long, and fit once `too_long: truncate` has cut them
    longest: int | None = None  # tokens, image tokens included
    longest_where: str | None = None
    max_length: int | None = None
    notes: list[str] = field(default_factory=list)  # of rows that can be used, but not all of them
    sizes: list[Sizes] = field(default_factory=list)  # of each row
    pictures: dict[str, bytes] = field(default_factory=dict)  # file -> perceptual hash, see overlap.py
    twins: list[list[int]] = field(default_factory=list)  # groups of rows with the same turns and pictures
    overlap: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # evaluation file -> pairs of pictures

    @property
    def ok(self) -> bool:
        return not self.bad

    @property
    def bad_of_source(self) -> dict[str, Counter[str]]:
        """Source -> reason -> rows."""
        return {
            name: Counter(bad.reason for bad in self.bad if bad.source == name) for name in sorted(self.rows_of_source)
        }

    def __str__(self) -> str:
        lines = [f"{self.rows} rows, {len(self.bad)} bad"]
        for name, reasons in self.bad_of_source.items():
            told = f" ({', '.join(f'{reason} {number}' for reason, number in sorted(reasons.items()))})"
            lines.append(
                f"  {name}: {self.rows_of_source[name]} rows, {reasons.total()} bad" + (told if reasons else "")
            )
        if self.longest is not None:
            lines.append(f"longest: {self.longest} tokens, {self.longest_where}")
        if self.cut:
            lines.append(f"{len(self.cut)} rows are too long and lose their last turns")
        if self.twins:
            repeated = sum(len(rows) - 1 for rows in self.twins)
            lines.append(f"{repeated} rows repeat another one, turns and pictures alike")
        for name, pairs in self.overlap.items():
            theirs = {other for _, other in pairs}
            lines.append(f"{len(theirs)} pictures of {name} look like one of these" + (":" if pairs else ""))
            lines += [f"  {other} like {ours}" for ours, other in pairs[:NAMED]]
        return printable("\n".join([*lines, *self.notes, *(row.error for row in self.bad)]))

    def write(self, path: str | Path) -> None:
        """Writes the bad rows as JSONL: {index, source, reason, error, …}."""
        text = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in self.bad)
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")


def check_mixture(
    mixture: Mixture,
    encoder: ConversationEncoder | None = None,
    decode: bool = True,
    progress: bool = True,
    hashes: bool = False,
) -> CheckReport:
    """Takes every row as training would and gathers every error.

    Of a mixture opened with `keep_bad` bad records are told too.

    Args:
        encoder: also encodes each row, so that too long and unsupervised rows are found.
        decode: also decodes pictures; without this they need only exist, and an encoder looks at long rows alone.
        progress: whether to draw a progress bar.
        hashes: also takes perceptual hashes of the pictures, and looks for rows that repeat.
    """
    check = _RowCheck(mixture, encoder, decode, hashes)
    report = CheckReport(
        rows=len(mixture),
        rows_of_source=dict(Counter(mixture.source_of_row)),
        max_length=None if encoder is None else encoder.max_length,
    )
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    alike: dict[bytes, list[int]] = {}
    with Progress(*columns, disable=not progress) as bar:
        for index, finding in enumerate(bar.track(check.all(), total=len(mixture))):
            if finding.error is not None:
                report.bad.append(bad_row(mixture, index, finding.error))
            if finding.cut is not None:
                report.cut.append(bad_row(mixture, index, finding.cut, cut=True))
            if finding.note:
                report.notes.append(finding.note)
            report.pictures |= finding.pictures
            if finding.content:
                alike.setdefault(finding.content, []).append(index)
            if encoder is not None and decode:
                report.sizes.append(finding.sizes)
                if finding.sizes.tokens > (report.longest or 0):
                    report.longest, report.longest_where = finding.sizes.tokens, finding.where
    report.twins = [rows for rows in alike.values() if len(rows) > 1]
    return report


def check_overlap(report: CheckReport, theirs: Mixture, progress: bool = True) -> list[tuple[str, str]]:
    """Pairs of pictures (one of the report's, one of theirs) that look the same; what cannot be read is left out."""
    return overlap(report.pictures, check_mixture(theirs, hashes=True, progress=progress).pictures)


@dataclass
class _Finding:
    """What is to be told of one row."""

    where: str = ""
    error: UserError | None = None
    cut: UserError | None = None
    sizes: Sizes = NO_SIZES
    note: str = ""
    content: bytes = b""  # of turns and names of pictures: a hash
    pictures: dict[str, bytes] = field(default_factory=dict)


class _RowCheck(Dataset[_Finding]):
    """Row i's findings. Without an encoder each process decodes a file once."""

    BATCH = 64  # rows a process checks at a time
    ROWS_FOR_PROCESSES = 1000  # fewer are checked before processes have started

    def __init__(self, mixture: Mixture, encoder: ConversationEncoder | None, decode: bool, hashes: bool) -> None:
        self.mixture = mixture
        self.encoder = encoder
        self.unbounded = copy(encoder)  # tells how long a too long row is
        if self.unbounded is not None:
            self.unbounded.max_length = None
        self.decode = decode
        self.hashes = hashes
        self._decoded: set[Path | EmbeddedImage] = set()

    def all(self) -> Iterator[_Finding]:
        takes_time = self.decode or self.encoder is not None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = cores if takes_time and len(self) >= self.ROWS_FOR_PROCESSES else 0
        yield from chain.from_iterable(DataLoader(self, self.BATCH, num_workers=processes, collate_fn=list))

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> _Finding:
        finding = _Finding()
        try:
            conversation = self.mixture.read(index, check_files=False)
            finding.where = conversation.where
            if conversation.opening_dropped:
                finding.note = (
                    f"{conversation.where}: begins with a turn of the assistant, to no question; it is left out."
                )
            if self.hashes:
                content = repr((conversation.turns, conversation.images)).encode()
                finding.content = hashlib.blake2b(content, digest_size=12).digest()
            images = self._pictures(conversation, finding)
            if self.encoder is not None:
                self._measure(conversation, images, finding)
        except UserError as error:
            finding.error = error
        return finding

    def _pictures(self, conversation: Conversation, finding: _Finding) -> list[Image.Image] | None:
        """The decoded pictures if the encoder needs them. Raises ImageError that tells of every bad one of the row."""
        images, errors = [], []
        for path in conversation.images:
            try:
                if not self.decode:
                    if not isinstance(path, EmbeddedImage) and not os.path.isfile(path):
                        raise missing_image(path, conversation.where)
                elif self.encoder is not None or path not in self._decoded:
                    images.append((self.encoder.open if self.encoder else open_image)(path, where=conversation.where))
                    if self.hashes and path not in self._decoded:
                        finding.pictures[str(path)] = picture_hash(images[-1])
                    self._decoded.add(path)
            except ImageError as error:
                errors.append(error)
        if errors:
            kind = type(errors[0])
            raise kind("\n".join(map(str, errors)))
        return images if self.decode else None

    def _measure(self, conversation: Conversation, images: list[Image.Image] | None, finding: _Finding) -> None:
        """Raises what training would raise. A row that `too_long: truncate` cuts is `cut` instead."""
        if images is None:
            if self.encoder.surely_fits(conversation):
                return
            sizes = Sizes(self.encoder.measure(conversation), len(conversation.images) * self.encoder.image_tokens)
        else:
            sample = self.unbounded.encode(conversation, images)
            is_image = sample["input_ids"] == self.encoder.processor.image_token_id
            sizes = Sizes(len(is_image), int(is_image.sum()), int((sample["labels"] != IGNORED).sum()))
        finding.sizes = sizes
        try:
            self.encoder.check_length(sizes.tokens, sizes.image_tokens, conversation.where)
        except TooLongError as error:
            if self.mixture.config.too_long != "truncate":
                raise
            self.encoder.shortened(conversation)
            finding.cut = error
