"""How a file is written: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replacing", "write_whole"]


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Let the caller write a draft, which takes the place of ``path`` if nothing goes wrong.

    A reader sees the old file or the new one, never a half; an error leaves no draft behind.

    Args:
        path: Where the file will be; its folder exists.
        durable: Wait until the draft is on the disk before it gets its name, so that a name never
            stands for half a file, not even after a power cut.

    Yields:
        Where to write.

    Raises:
        OSError: if the file cannot be written.
    """
    # Two processes may write the same file: each has a draft of its own.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        if durable:
            with draft.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Write a file whole or not at all; text is UTF-8. Otherwise as `replacing`.

    Raises:
        OSError: if it cannot be written.
    """
    with replacing(path, durable=durable) as draft:
        draft.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
