"""A file of records as a sequence of conversations: LLaVA JSON (one list) or JSONL (one record a line), or either
compressed with gzip."""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm.common.errors import RowError, UserError
from mllm.data.conversation import Conversation

NAMED = 3  # bad rows that a refusal names; `mllm check` names all
# First bytes of what people hand over instead, and what to do with it.
GZIP = b"\x1f\x8b"
OTHER_FORMATS = {
    b"PAR1": "a parquet file. Write its rows as JSONL, for instance with datasets.Dataset.to_json",
    b"PK\x03\x04": "a zip archive. Unpack it and name the JSON or JSONL file in it",
    b"ARROW1": "an Arrow file. Write its rows as JSONL, for instance with datasets.Dataset.to_json",
}
TAR = slice(257, 262)  # where a tar archive says that it is one
UTF16 = (b"\xff\xfe", b"\xfe\xff")

logger = logging.getLogger(__name__)


class Source(Sequence[Conversation]):
    """The conversations of one file, made when they are asked for.

    All records are checked on opening, pictures only when a row is taken. Records are kept as one block of bytes:
    hundreds of thousands of small Python objects would be copied page by page into every data-loading process.

    Attributes:
        bad: row index -> why that record cannot be used. Taking the row raises it. Empty unless `keep_bad`.
        source_of_row, domain_of_row: name of each row; those of a bad record are always those of some good one.
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
        keep_bad: bool = False,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            path: JSON or JSONL, plain or gzip; which, its content tells.
            image_root: folder that `image` is relative to; the file's own folder by default.
            name: source name of every row; by default the record's, or else the file's name without suffix.
            domain: domain of every row; by default the record's, or else the source's name.
            allow_outside_root: whether a record may name pictures outside `image_root`.
            check_files: whether taking a row looks that its pictures exist; a reader of text alone needs none.
            keep_bad: whether records that cannot be used are kept as rows, listed in `bad`, instead of refusing the
                file.
            columns: our names of columns (question, answer, image …) -> the file's, where they differ.

        Raises:
            UserError: no such file or folder, no file of records, malformed JSON (with line and column), no
                records, or records that `Conversation.from_record` refuses (the first few by row).
        """
        self.path = Path(path)
        self.image_root = Path(image_root) if image_root is not None else self.path.parent
        self.name = name
        self.domain = domain
        self.allow_outside_root = allow_outside_root
        self.check_files = check_files
        self.columns = columns
        if check_files and not self.image_root.is_dir():
            raise UserError(f"{self.path}: image root {self.image_root} is not a folder.")
        lines: list[bytes] = []
        rows: list[int] = []
        self.bad: dict[int, str] = {}
        opened_by_assistant: list[int] = []
        self.source_of_row: list[str] = []
        self.domain_of_row: list[str] = []
        for row, record in _read_records(self.path):
            (source, domain), line = self._names_told(record), b""
            try:
                if isinstance(record, RowError):
                    raise record
                conversation = self._conversation(record, row, check_files=False)
                source, domain = conversation.source, conversation.domain
                line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
                if conversation.opening_dropped:
                    opened_by_assistant.append(row)
            except UserError as error:
                self.bad[len(lines)] = str(error)
            self.source_of_row.append(source)
            self.domain_of_row.append(domain)
            lines.append(line)
            rows.append(row)
        if opened_by_assistant:
            logger.warning(
                "%s: %d rows begin with a turn of the assistant, to no question, and lose it (the first: row %d)",
                self.path, len(opened_by_assistant), opened_by_assistant[0],
            )  # fmt: skip
        if not lines:
            raise UserError(f"{self.path}: no records. Expected a list of records, or one record a line.")
        if self.bad and not keep_bad:
            raise RowError(tell_first(list(self.bad.values())))
        self._name_bad_rows()
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
        """The conversation of one row. Raises as `read` does."""
        return self.read(index, check_files=self.check_files)

    def read(self, index: int, *, check_files: bool) -> Conversation:
        """The conversation of one row.

        Raises:
            RowError: the record cannot be used; `ImageError`, if files are checked and a picture's does not exist.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: row index {index} of {len(self)} rows.")
        index %= len(self)
        if index in self.bad:
            raise RowError(self.bad[index])
        start = self._ends[index - 1] if index else 0
        record = json.loads(self._bytes[start : self._ends[index]].tobytes().decode("utf-8", "surrogatepass"))
        return self._conversation(record, int(self._rows[index]), check_files=check_files)

    def _names_told(self, record: Any) -> tuple[str, str]:
        """Names of source and domain as far as a record tells them, usable or not."""
        told = record if isinstance(record, dict) else {}
        names = [value if isinstance(value := told.get(key), str) and value else None for key in ("source", "domain")]
        source = self.name or names[0] or self.path.stem
        return source, self.domain or names[1] or source

    def _name_bad_rows(self) -> None:
        """Gives bad rows whose names no good row has those of the good row before them, or else of the first."""
        names = list(zip(self.source_of_row, self.domain_of_row, strict=True))
        good = {names[row]: None for row in range(len(names)) if row not in self.bad}
        before = next(iter(good), None)
        for row, own in enumerate(names):
            if before is not None and own not in good:
                self.source_of_row[row], self.domain_of_row[row] = before
            elif row not in self.bad:
                before = own

    def _conversation(self, record: Any, row: int, *, check_files: bool) -> Conversation:
        has_name = isinstance(record, dict) and record.get((self.columns or {}).get("source", "source"))
        return Conversation.from_record(
            record,
            image_root=self.image_root,
            where=f"{self.path}: row {row}",
            source=self.name or (None if has_name else self.path.stem),
            domain=self.domain,
            check_files=check_files,
            allow_outside_root=self.allow_outside_root,
            columns=self.columns,
        )


def tell_first(errors: Sequence[str]) -> str:
    """The first few of many errors, and how many there are."""
    more = len(errors) - NAMED
    return "\n".join([*errors[:NAMED], *([f"and {more} rows more; `mllm check` names them all."] if more > 0 else [])])


def _read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Pairs (row, record), or (row, RowError) for a line that is none. Rows count from 1; in JSONL they are lines."""
    content = _read(path)
    if content.lstrip()[:1] == b"[":
        yield from enumerate(_parse_list(content, path), 1)
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, _parse_line(line, number, f"{path}: row {number}")


def _read(path: Path) -> bytes:
    """The content, unpacked and without a byte-order mark. Raises UserError for what is no text of records."""
    try:
        content = path.read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
    except FileNotFoundError as error:
        raise UserError(f"no such data file: {path}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    kinds = [what for magic, what in OTHER_FORMATS.items() if content.startswith(magic)]
    if content[TAR] == b"ustar":
        kinds.append("a tar archive. Unpack it and name the JSON or JSONL file in it")
    if kinds:
        raise UserError(f"{path}: this is {kinds[0]}. Expected LLaVA JSON or JSONL.")
    if content.startswith(UTF16):
        raise UserError(f"{path}: not UTF-8 text but UTF-16. Write it as UTF-8. Expected LLaVA JSON or JSONL.")
    return content.removeprefix(b"\xef\xbb\xbf")


def _parse_list(content: bytes, path: Path) -> list[Any]:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Expected LLaVA JSON or JSONL.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_malformed(error)} Expected a list of records, or one record a line.") from error


def _parse_line(line: bytes, number: int, where: str) -> Any:
    """A record, or why there is none."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"{where}: not UTF-8 text (byte {error.start} of the line). Expected one JSON record.")
    except (ValueError, RecursionError) as error:
        return RowError(f"{where}: {_malformed(error, number)} Expected one record a line.")


def _malformed(error: Exception, first_line: int = 1) -> str:
    """What a JSON parser found, and where: a syntax error, a number of thousands of digits, or endless nesting."""
    if isinstance(error, json.JSONDecodeError):
        line = first_line + error.lineno - 1
        return f"malformed JSON at line {line}, column {error.colno}: {error.msg}."
    return f"JSON that cannot be read ({error or type(error).__name__})."
