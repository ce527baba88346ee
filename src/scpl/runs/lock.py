"""The lock on a run folder: one run at a time writes into it.

The system keeps the lock, not the file, so a process that is gone holds nothing, however it went;
one that is stopped still does. A process that was forked off the owner does not hold it either.

Every rank locks a byte of its own in the folder that it sees, the first one the first byte. On a
disk that all machines share that is one file, so the first rank also notices a process that an
earlier run has left on another machine. Where each machine has a disk of its own, each rank guards
its own folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import weakref
from pathlib import Path

from scpl.errors import CheckpointError

__all__ = ["LOCK_FILE", "RunLock"]

LOCK_FILE = ".lock"
PATIENCE = 10.0
"""Seconds that processes of a run whose first one is gone get to notice it, and to end."""
TO_THE_END = 0
_HELD = (errno.EACCES, errno.EAGAIN)
_UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class RunLock:
    """The right of one rank to write into a run folder, until `release` or the process ends.

    Args:
        folder: The run folder; it exists.
        rank: Which rank this is.

    Attributes:
        works: Whether the disk has locks; some of networks have none, and keep nobody out.
        is_new: Whether no process had ever locked the folder.

    Raises:
        CheckpointError: if a process that lives holds it.
        OSError: if the folder is not writable.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        path, flags = folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.is_new = self.works = True
        try:
            file = os.open(path, flags | os.O_EXCL, 0o666)
        except FileExistsError:
            self.is_new = False
            file = os.open(path, flags, 0o666)
        self._close = weakref.finalize(self, os.close, file)
        try:
            _take(file, folder, rank)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
            self.works = False
        except CheckpointError:
            self.release()
            raise

    def release(self) -> None:
        """Give it up; a second time does nothing."""
        self._close()


def _take(file: int, folder: Path, rank: int) -> None:
    """Lock the byte of a rank; the first rank also waits until nobody holds any other."""
    steps = [(0, 1, 0.0), (1, TO_THE_END, PATIENCE)] if rank == 0 else [(rank, 1, PATIENCE)]
    for start, length, patience in steps:
        deadline = time.monotonic() + patience
        while not _lock(file, start, length):
            if time.monotonic() >= deadline:
                owner = os.pread(file, 200, 0).decode(errors="replace").strip()
                raise CheckpointError(
                    "One run at a time may write into a run folder",
                    f"{folder} is in use by {owner or 'another process'}",
                    "Wait for its end, or end it",
                )
            time.sleep(0.05)
    if rank == 0:
        fcntl.lockf(file, fcntl.LOCK_UN, TO_THE_END, 1)
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _lock(file: int, start: int, length: int) -> bool:
    """Lock bytes that nobody else holds; returns whether that was so."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        if error.errno not in _HELD:
            raise
        return False
    return True
