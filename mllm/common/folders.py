"""Folders that results go to."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mllm.common.errors import UserError


def check_writable(folder: Path, key: str) -> None:
    """Raises UserError, naming `key`, unless the folder can be made, or written to where it is there. Makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise UserError(f"{key} is {folder}, but {there} is a file: give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key} is {folder}, but {there} may not be written to: give another folder.")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` at the end; what fails leaves nothing of its half."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
