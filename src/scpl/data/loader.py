"""What the loaders of images and of texts have in common: epochs of numbered mini-batches."""

from __future__ import annotations

import collections
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from scpl.errors import InputError

__all__ = [
    "Batch",
    "EpochLoader",
    "Inputs",
    "Shown",
    "check",
    "mapped_ahead",
    "prefetched",
]

Inputs: TypeAlias = Tensor | dict[str, Tensor]
"""What goes into a network: one tensor, or several by the names of its arguments."""
Batch: TypeAlias = tuple[Inputs, Tensor]
"""Inputs and targets."""
T = TypeVar("T")
R = TypeVar("R")


class Shown(NamedTuple):
    """A sample as people can look at it.

    Attributes:
        name: Which one it is.
        text: Its text, as far as the network reads it.
        picture: As PNG.
    """

    name: str
    text: str | None = None
    picture: bytes | None = None


class EpochLoader(ABC):
    """Iterates over mini-batches, each of which depends on the epoch and its own number alone.

    So training can resume in the middle of an epoch, and preparing batches in a thread changes no
    number. The global random state is neither read nor changed.

    Args:
        num_samples: Samples per epoch.
        batch_size: Samples per batch; one batch of an epoch may have fewer.
        prefetch: How many batches a background thread prepares ahead; 0 for no thread.

    Raises:
        InputError: A number is out of its range.
    """

    def __init__(self, num_samples: int, batch_size: int, prefetch: int) -> None:
        check(batch_size >= 1, "The batch size must be at least 1", batch_size)
        check(prefetch >= 0, "The number of batches to prefetch must be 0 or more", prefetch)
        self.num_samples, self.batch_size, self.prefetch = num_samples, batch_size, prefetch
        self.epoch = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-self.num_samples // self.batch_size)

    @abstractmethod
    def _produce(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        """Make the batches of an epoch from number ``start`` on."""

    @abstractmethod
    def show(self, place: int) -> Shown:
        """Show the sample that comes at a place of the epoch, from 0."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the iterators made from now on; those under way keep theirs."""
        check(epoch >= 0, "The epoch must be 0 or more", epoch)
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Iterate over the batches of the epoch, beginning with number ``start``.

        Those before are not produced. Closing the iterator, or dropping the last reference to it,
        ends its thread.

        Yields:
            Inputs and targets; see the class.

        Raises:
            InputError: ``start`` is not one of 0..len(self).
        """
        check(0 <= start <= len(self), f"The first batch must be 0..{len(self)}", start)
        produced = self._produce(self.epoch, start)
        return prefetched(produced, self.prefetch) if self.prefetch else produced


def check(holds: bool, rule: str, got: int) -> None:
    """Raise InputError unless a number is in its range."""
    if not holds:
        raise InputError(rule, f"Got {got}")


def prefetched(items: Iterator[T], depth: int, *, patient: bool = True) -> Generator[T, None, None]:
    """Yield ``items``, taken by a thread that is at most ``depth`` (1 or more) items ahead.

    The thread starts with the first item asked for. It ends when the items do, when they raise (the
    error is raised here), and when this iterator is closed or no longer referenced. Closing it
    waits for that, unless it is not ``patient``: an item may be long in coming, as from a terminal.
    """
    source = _Source(items, depth)
    source.thread.start()
    try:
        while not isinstance(item := source.queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        source.stop(patient)


def mapped_ahead(
    function: Callable[[T], R], items: Iterable[T], workers: int
) -> Generator[R, None, None]:
    """Yield ``function`` of each item in order, from threads that are at most two rounds ahead."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="scpl-worker")
    waiting: collections.deque[Future[R]] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _End:
    """Marks the end of the items, and what ended them."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


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

    def stop(self, wait: bool) -> None:
        """End the thread, and perhaps wait for it.

        Once ``stopped`` is set it puts at most one item more, for which the emptied queue has room.
        """
        self.stopped.set()
        if threading.current_thread() is self.thread:
            return  # a forgotten iterator was collected as garbage by this very thread
        while not self.queue.empty():
            self.queue.get_nowait()
        if wait:
            self.thread.join()
