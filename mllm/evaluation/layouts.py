"""Files as publishers ship them (JSON, lines, tables, parquet, plain pickles), read for benchmarks and recipes."""

import base64
import csv
import json
import pickle
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm.common.errors import UserError


def read_json(path: Path) -> Any:
    """Raises UserError where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """One JSON object a line. Raises UserError naming the line that is none."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}: line {number} is not JSON ({error}).") from error


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV, or of a TSV by its suffix; fields may hold whole pictures in base64."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")


def read_parquet(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Rows of parquet files in the order of their names, a few at a time; pictures stay encoded."""
    with _extra("pyarrow"):
        from pyarrow import parquet
    for path in sorted(paths):
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()


def read_datasets_folder(path: Path, split: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a folder that `datasets` saved to disk; pictures stay encoded."""
    with _extra("datasets"):
        import datasets
    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{path}: no split {split!r}; there is {', '.join(data)}.")
        data = data[split]
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    yield from data


@contextmanager
def _extra(library: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"reading this needs {library}: pip install 'mllm-experts[eval]'.") from error


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dictionaries, texts and numbers; whatever would run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """Raises UserError for a pickle of anything but lists, dictionaries, texts and numbers."""
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path}: not a pickle of plain values ({error}); it is not read.") from error


def picture(folder: Path, name: str, places: Sequence[str]) -> str:
    """Where below `folder` a picture lies: the first of `places` that has it, else the first, for the message."""
    tried = [f"{place}/{name}" if place else name for place in places]
    return next((each for each in tried if (folder / each).is_file()), tried[0])


def first_there(folder: Path, *patterns: str) -> Path:
    """The first file, by name, that the first fitting pattern finds."""
    return next(path for pattern in patterns for path in sorted(folder.glob(pattern)))


def embedded(value: Any) -> bytes:
    """A picture's file from what parquet (`{bytes, path}`) and TSV (base64) hold."""
    if isinstance(value, dict):
        value = value["bytes"]
    return value if isinstance(value, bytes) else base64.b64decode(value, validate=True)


def commonest(answers: Sequence[str]) -> str:
    """The answer that most people gave, the first of equals."""
    return Counter(answers).most_common(1)[0][0]
