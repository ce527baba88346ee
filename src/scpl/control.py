"""What ranks need of each other besides messages, and the control of a run with one rank."""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from scpl.errors import LinkError
from scpl.mesh import Mesh

__all__ = ["Control", "LocalControl"]


class Control(Protocol):
    """What ranks need of each other besides messages."""

    mesh: Mesh

    @property
    def headers(self) -> dist.ProcessGroup:
        """The process group on the CPU that headers of messages use."""

    @property
    def data(self) -> dist.ProcessGroup:
        """The process group that features use."""

    def new_group(self) -> dist.ProcessGroup:
        """Make a process group of all ranks for one purpose; all ranks must call it."""

    def share(self, key: str, value: Any) -> None:
        """Tell all ranks a JSON value."""

    def fetch(self, key: str) -> Any:
        """Learn what a rank shared; waits for it."""

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Share a JSON value and learn those of all ranks."""

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Fill ``tensor`` (on the CPU) with the owner's values, on all ranks."""

    def check(self) -> None:
        """Raise if another rank has failed."""

    def hurry(self) -> None:
        """Something may have died: notice a silent rank sooner."""

    def fail(self, error: BaseException, text: str) -> bool:
        """Tell all ranks why this one ends; False if another one was first."""

    def close(self) -> None:
        """Part from the others after a good end."""

    def end_process(self, error: BaseException) -> None:
        """End this process because of an error, if others depend on it."""


class LocalControl:
    """The control of the only rank."""

    def __init__(self) -> None:
        self.mesh = Mesh()
        self._values: dict[str, Any] = {}

    @property
    def headers(self) -> dist.ProcessGroup:
        """There are no messages."""
        raise LinkError("Only several ranks have links", "Got one rank")

    @property
    def data(self) -> dist.ProcessGroup:
        """There are no messages."""
        raise LinkError("Only several ranks have links", "Got one rank")

    def new_group(self) -> dist.ProcessGroup:
        """There is nobody to talk to."""
        raise LinkError("Only several ranks have links", "Got one rank")

    def share(self, key: str, value: Any) -> None:
        """Remember a value."""
        self._values[key] = value

    def fetch(self, key: str) -> Any:
        """Recall a value."""
        return self._values[key]

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Return the only value."""
        return [value]

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Do nothing: the values are here."""

    def check(self) -> None:
        """Do nothing: nobody else can fail."""

    def hurry(self) -> None:
        """Do nothing: nobody else can be silent."""

    def fail(self, error: BaseException, text: str) -> bool:
        """Do nothing: nobody else must know."""
        return True

    def close(self) -> None:
        """Do nothing."""

    def end_process(self, error: BaseException) -> None:
        """Do nothing: the error goes its way."""
