"""A file of records as a sequence of conversations: LLaVA JSON (one list) or JSONL (one record a line)."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.conversation import Conversation
from mllm.errors import UserError

logger = logging.getLogger(__name__)


class Source(Sequence[Conversation]):
    """The conversations of one file, made when they are asked for.

    All records are checked on opening, pictures only when a row is taken. Records are kept as one block of bytes:
    hundreds of thousands of small Python objects would be copied page by page into every data-loading process.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_root: str | Path | None = None,
        name: str | None = None,
        domain: str | None = None,
        allow_outside_root: bool = False,
        check_files: bool = True,
    ) -> None:
        """
        Args:
            path: JSON or JSONL; which, its content tells.
            image_root: folder that `image` is relative to; the file's own folder by default.
            name: source name of every row; by default the record's, or else the file's name without suffix.
            domain: domain of every row; by default the record's, or else the source's name.
            allow_outside_root: whether a record may name pictures outside `image_root`.
            check_files: whether taking a row looks that its pictures exist; a reader of text alone needs none.

        Raises:
            UserError: no such file or folder, malformed JSON (with line and column), no records, or a record that
                `Conversation.from_record` refuses (with its row).
        """
        self.path = Path(path)
        self.image_root = Path(image_root) if image_root is not None else self.path.parent
        self.name = name
        self.domain = domain
        self.allow_outside_root = allow_outside_root
        self.check_files = check_files
        if check_files and not self.image_root.is_dir():
            raise UserError(f"{self.path}: image root {self.image_root} is not a folder.")
        lines: list[bytes] = []
        rows: list[int] = []
        opened_by_assistant: list[int] = []
        self.source_of_row: list[str] = []
        self.domain_of_row: list[str] = []
        for row, record in _read_records(self.path):
            conversation = self._conversation(record, row, check_files=False)
            self.source_of_row.append(conversation.source)
            self.domain_of_row.append(conversation.domain)
            lines.append(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"))
            rows.append(row)
            if conversation.opening_dropped:
                opened_by_assistant.append(row)
        if opened_by_assistant:
            logger.warning(
                "%s: %d rows begin with a turn of the assistant, to no question, and lose it (the first: row %d)",
                self.path, len(opened_by_assistant), opened_by_assistant[0],
            )  # fmt: skip
        if not lines:
            raise UserError(f"{self.path}: no records. Expected a list of records, or one record a line.")
        self._bytes = np.frombuffer(b"".join(lines), dtype=np.uint8)
        self._ends = np.cumsum([len(line) for line in lines])
        self._rows = np.array(rows)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def content(self) -> bytes:
        """All records, one after another."""
        return self._bytes.tobytes()

    def __getitem__(self, index: int) -> Conversation:
        """The conversation of one row. Raises `ImageError` if one of its pictures does not exist."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: row index {index} of {len(self)} rows.")
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        record = json.loads(self._bytes[start : self._ends[index]].tobytes().decode("utf-8", "surrogatepass"))
        return self._conversation(record, int(self._rows[index]), check_files=self.check_files)

    def _conversation(self, record: Any, row: int, *, check_files: bool) -> Conversation:
        has_name = isinstance(record, dict) and record.get("source")
        return Conversation.from_record(
            record,
            image_root=self.image_root,
            where=f"{self.path}: row {row}",
            source=self.name or (None if has_name else self.path.stem),
            domain=self.domain,
            check_files=check_files,
            allow_outside_root=self.allow_outside_root,
        )


def _read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Pairs (row, record). Rows count from 1; in JSONL they are line numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"no such data file: {path}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Expected LLaVA JSON or JSONL.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    if text.lstrip()[:1] == "[":
        yield from enumerate(_parse(text, path, line=1), 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parse(line, path, line=number)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: malformed JSON at line {line + error.lineno - 1}, column {error.colno}: {error.msg}. "
            "Expected a list of records, or one record a line."
        ) from error
