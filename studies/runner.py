"""A folder of finished runs that a study can go on from, and that several processes may fill at the same time.

A run is `<name>.json` beside `<name>.npz`; it is there whole or not at all. Who works on a run holds the lock of
`<name>.lock`, which the system lets go when the process ends, however it ends.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


def digest(values: Any) -> str:
    """A short name for JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def claimed(lock: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds the lock file; held until the block ends. With `wait` it always does."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@dataclass(frozen=True)
class KeptRuns:
    """Records (JSON values) with arrays, by name."""

    folder: Path

    def read(self, name: str) -> dict[str, Any] | None:
        """The record of a run, or None where it was not finished."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a finished run."""
        with np.load(self.folder / f"{name}.npz") as arrays:
            return dict(arrays)

    def keep(self, name: str, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a run, whole or not at all: the record comes last, and by renaming."""
        self.folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(self.folder / f"{name}.npz", **arrays)
        draft = self.folder / f"{name}.part"
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / f"{name}.json")

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether the run is this process's to do: it is not finished, and nobody else is at it.

        The lock file is removed once the run is there: a process that still opens it finds the run finished.
        """
        lock = self.folder / f"{name}.lock"
        with claimed(lock) as mine:
            yield mine and self.read(name) is None
            if mine and self.read(name) is not None:
                lock.unlink(missing_ok=True)
