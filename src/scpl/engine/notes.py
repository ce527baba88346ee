"""Notes that the ranks of a run leave for each other in the launcher's store.

Whoever reaches the port of torch's store can read it and write into it: it asks for no password. So
every note carries a seal, and one that no rank of this run has written is not believed.
"""

from __future__ import annotations

import hmac
import json
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, final

from scpl.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

__all__ = ["NOTHING", "SECRET", "Notes", "believed"]

SECRET = "SCPL_SECRET"
"""The environment variable with the secret of a run. `scpl.app.launch` draws one for every run on
this machine; for several machines the user may set it, to the same on all. Without one a seal shows
only that a note is where it was meant to be."""


class _Nothing:
    def __repr__(self) -> str:
        return "NOTHING"


NOTHING: Final = _Nothing()
"""There is no note, or none that a rank of this run wrote."""


@final
class Notes:
    """JSON values by name.

    Args:
        store: A connection of its own: a connection serves one caller at a time.
        secret: What seals the notes; default: what the environment says.
    """

    def __init__(self, store: PrefixStore, secret: str | None = None) -> None:
        self._store = store
        self._secret = (os.environ.get(SECRET, "") if secret is None else secret).encode()

    def write(self, name: str, value: Any) -> None:
        """Leave a note, in place of an earlier one of that name."""
        self._store.set(name, self._sealed(name, value))

    def claim(self, name: str, value: Any) -> Any:
        """Leave a note unless there is one of that name; returns the one that is there then."""
        mine = self._sealed(name, value)
        there = self._opened(name, self._store.compare_set(name, "", mine))
        if there is NOTHING:
            self._store.set(name, mine)
            return value
        return there

    def exists(self, name: str) -> bool:
        """Whether somebody, maybe a stranger, left a note of that name."""
        return bool(self._store.check([name]))

    def read(self, name: str) -> Any:
        """Read a note; `NOTHING` if there is none that a rank of this run wrote."""
        return self._opened(name, self._store.get(name)) if self.exists(name) else NOTHING

    def remove(self, name: str) -> None:
        """Take a note away."""
        self._store.delete_key(name)

    def limit(self, seconds: float) -> None:
        """Wait for the store no longer than this: a link that is cut answers nothing at all."""
        self._store.set_timeout(timedelta(seconds=seconds))

    def _sealed(self, name: str, value: Any) -> str:
        content = json.dumps(value)
        return f"{self._seal(name, content)} {content}"

    def _opened(self, name: str, note: bytes) -> Any:
        seal, _, content = note.decode(errors="replace").partition(" ")
        if not hmac.compare_digest(seal.encode(), self._seal(name, content).encode()):
            return NOTHING
        return json.loads(content)

    def _seal(self, name: str, content: str) -> str:
        # With its name: no note may take the place of another one.
        return hmac.digest(self._secret, f"{name} {content}".encode(), "sha256").hex()


def believed(notes: Notes, name: str) -> Any:
    """Read a note that is there.

    Raises:
        InputError: if no rank of this run wrote it.
    """
    value = notes.read(name)
    if value is NOTHING:
        raise InputError(
            f"All ranks must seal their notes with the same secret ({SECRET})",
            f"Got {name!r} with another seal: that variable differs between machines, or somebody "
            "else writes into the store",
            "Set it to the same on every machine, and let no stranger into their network",
        )
    return value
