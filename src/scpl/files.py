"""How a file is written: whole or not at all, texts as UTF-8; and why it could not be."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["as_utf8", "free_space", "is_draft", "reason", "replacing", "sync_folder", "write_whole"]


_DRAFT = ".tmp"


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Let the caller write a draft, which takes the place of ``path`` if nothing goes wrong.

    A reader sees the old file or the new one, never a half; an error leaves no draft behind.

    Args:
        path: Where the file will be; its folder exists.
        durable: Wait until the draft is on the disk before it gets its name, and then until the
            name is, so that not even a power cut leaves half a file or takes back a whole one.

    Yields:
        Where to write.

    Raises:
        OSError: if the file cannot be written.
    """
    # Two processes may write the same file: each has a draft of its own.
    draft = path.with_name(f".{path.name}.{os.getpid()}{_DRAFT}")
    try:
        yield draft
        if durable:
            with draft.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(draft, path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def is_draft(name: str) -> bool:
    """Whether a file of this name is a draft, which a process left that was killed meanwhile."""
    return name.startswith(".") and name.endswith(_DRAFT)


def as_utf8(text: str) -> bytes:
    """Encode a text; what is no character (a byte of some file's name) is escaped."""
    return text.encode("utf-8", "backslashreplace")


def write_whole(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Write a file whole or not at all; text is UTF-8. Otherwise as `replacing`.

    Raises:
        OSError: if it cannot be written.
    """
    with replacing(path, durable=durable) as draft:
        draft.write_bytes(as_utf8(content) if isinstance(content, str) else content)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk.

    Raises:
        OSError: if the disk fails.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(folder)


def free_space(path: Path) -> int | None:
    """Bytes that may still be written where ``path`` is or will be; None if nobody can tell."""
    with suppress(OSError):
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        usage = shutil.disk_usage(there)
        return usage.free if usage.total else None  # a file system that does not count
    return None


def reason(error: BaseException, path: Path, needed: int | None = None) -> str:
    """Say in a few words why a file could not be written.

    Args:
        error: What was raised. Some libraries raise another error over that of the disk; then what
            the disk said is told.
        path: The file.
        needed: How many bytes it was to have, if that is known.
    """
    told: BaseException | None = error
    while told is not None and not (isinstance(told, OSError) and told.errno):
        told = told.__cause__ or told.__context__
    if not isinstance(told, OSError) or not told.errno:
        return (str(error).splitlines() or [type(error).__name__])[0]
    words = os.strerror(told.errno)
    if told.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return words
    sizes = {"needed": needed, "free": free_space(path)}
    facts = ", ".join(f"{size:,} bytes {name}" for name, size in sizes.items() if size is not None)
    return f"{words} ({facts})" if facts else words
