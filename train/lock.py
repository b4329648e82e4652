"""One job a folder: a lock that the system takes back when its holder ends, however it ends.

Locks of POSIX, a byte for each process of a job: they are the process's own, so a data-loading process that outlives
its rank keeps none, and they hold on NFS too. Byte 0 belongs to what started the job, byte 1 + r to rank r.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN
from pathlib import Path

from mllm.common.errors import UserError
from mllm.common.folders import check_writable

LOCK = ".lock"
STARTER = "MLLM_STARTER"  # in the environment of what `train.launch`, which holds byte 0, starts: the parent's id
PATIENCE = 3.0  # seconds in which ranks whose launcher was killed are gone


@contextmanager
def only_job(folder: Path, rank: int | None = None) -> Iterator[None]:
    """Holds a run's folder, which is made where there is none, for this process's part of a job.

    A folder that holds nothing but the lock afterwards is removed again, with what was made above it.

    Args:
        folder: `run.output_dir`.
        rank: of this process; None: it starts the ranks.

    Raises:
        UserError: another job trains into the folder, or it cannot be written to.
    """
    check_writable(folder, "run.output_dir")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    is_alone = rank == 0 and STARTER not in os.environ  # nobody holds byte 0 for it
    file = _locked(folder, *((0, 0) if rank is None else (0, 2) if is_alone else (1 + rank, 1)))
    if rank is None:  # nobody else is there, and ranks are to come
        fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)
    try:
        yield
    finally:
        if rank is None or is_alone or holds_nothing(folder):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(file)
        for path in made:
            with suppress(OSError):  # what is not empty stays
                path.rmdir()


def holds_nothing(folder: Path) -> bool:
    """Whether there is nothing in a folder but its lock."""
    return not folder.is_dir() or {path.name for path in folder.iterdir()} <= {LOCK}


def _locked(folder: Path, start: int, length: int) -> int:
    """The open lock file, so many of its bytes locked; of length 0: all from the start on."""
    deadline = time.monotonic() + PATIENCE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno not in (EACCES, EAGAIN):
                print(f"{folder} cannot be locked ({error.strerror}): see to it that no other job trains into it.")
                return file
            os.close(file)
            if time.monotonic() > deadline:
                raise UserError(
                    f"another job trains into run.output_dir {folder}. Wait for its end or end it, or set another"
                    " run.output_dir."
                ) from None
            time.sleep(0.1)
            continue
        if _is_at(file, folder / LOCK):  # else the job before removed it meanwhile, and a third may lock a new one
            return file
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False
