"""Folders that results go to, and a process's own for what must not outlive it."""

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mllm.common.errors import UserError


def check_writable(folder: Path, key: str) -> None:
    """Raises UserError, naming `key`, unless the folder can be made, or written to where it is there. Makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise UserError(f"{key} is {folder}, but {there} is a file: give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key} is {folder}, but {there} may not be written to: give another folder.")


@cache
def process_folder(prefix: str) -> Path:
    """A private folder of this process among the temporary files, removed when the process ends.

    A process that is killed cannot remove its own: the next one that asks with the same prefix does. The lock tells
    which are left over; the system drops it with the process, however that ends.
    """
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{prefix}-*"):
        if left.is_dir() and not left.is_symlink() and left.stat().st_uid == os.getuid():
            lock = _lock(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-"))  # for this user alone
    _lock(folder)
    atexit.register(_remove, folder, os.getpid())
    return folder


def _lock(folder: Path) -> int | None:
    """The handle that locks a folder until it is closed; None if another process has it, or the folder is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked process ends without its parent's folder
        shutil.rmtree(folder, ignore_errors=True)


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
