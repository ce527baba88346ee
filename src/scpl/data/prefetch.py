"""Prepare the next items in a thread while the present one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

__all__ = ["prefetched"]

T = TypeVar("T")


class _End:
    """Marks the end of the items, and what ended them."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def prefetched(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield ``items``, taken by a thread that is at most ``depth`` items ahead.

    The thread starts with the first item asked for. It ends when the items do, when they raise (the
    error is raised here), and when this iterator is closed or no longer referenced.

    Args:
        items: Only the thread touches it from here on.
        depth: Size of the queue; at least 1.
    """
    source = _Source(items, depth)
    source.thread.start()
    try:
        while not isinstance(item := source.queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        source.stop()


class _Source(Generic[T]):
    def __init__(self, items: Iterator[T], depth: int) -> None:
        self.items = items
        self.queue: queue.Queue[T | _End] = queue.Queue(depth)
        self.stopped = threading.Event()
        # A daemon, so that an iterator someone forgot to close cannot keep the program from ending.
        self.thread = threading.Thread(target=self._fill, name="scpl-prefetch", daemon=True)

    def _fill(self) -> None:
        end = _End()
        try:
            for item in self.items:
                if self.stopped.is_set():
                    return
                self.queue.put(item)
                del item  # the queue holds it now; a second reference would double the memory
        except BaseException as error:
            end = _End(error)
        if not self.stopped.is_set():
            self.queue.put(end)

    def stop(self) -> None:
        """End the thread and wait for it.

        After ``stopped`` is set the thread puts at most one item more, and for that one the emptied
        queue has room; so it cannot stay blocked.
        """
        self.stopped.set()
        if threading.current_thread() is self.thread:
            return  # a forgotten iterator was collected as garbage by this very thread
        while not self.queue.empty():
            self.queue.get_nowait()
        self.thread.join()
