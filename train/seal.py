"""Sizes and digests of a checkpoint's files: written with it, compared before it is read."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

SEAL = "digests.json"


def seal(folder: Path) -> None:
    """Writes size and digest of every file of a checkpoint beside them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    entries = {str(path.relative_to(folder)): [path.stat().st_size, _digest(path)] for path in files}
    (folder / SEAL).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None: nothing, or it was written before there were seals."""
    if not (folder / SEAL).is_file():
        return None
    try:
        entries = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        expected = {folder / name: (int(size), str(digest)) for name, (size, digest) in entries.items()}
    except (ValueError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"
    for path, (size, _) in expected.items():
        if not path.is_file():
            return f"{path.relative_to(folder)} is missing"
        if path.stat().st_size != size:
            return f"{path.relative_to(folder)} has {path.stat().st_size:,} bytes of {size:,}"
    for path, (size, digest) in expected.items():
        if _known_digest(path, size, path.stat().st_mtime_ns) != digest:
            return f"{path.relative_to(folder)} is not what was written"
    return None


@lru_cache(maxsize=4096)  # a start looks at its checkpoint several times
def _known_digest(path: Path, size: int, changed: int) -> str:
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
