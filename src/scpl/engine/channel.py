"""The one-way channel between neighbouring ranks.

The rule: one direction, in order, at most `depth` messages in flight; a buffer
lives, unmodified, until its send completes. Because traffic never flows back there is no order of
messages that could deadlock.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scpl.engine.messages import Message, Stop, decode, encode
from scpl.engine.ranks import ManyRanks, Ranks
from scpl.engine.timeline import Timeline
from scpl.errors import LinkError
from scpl.partition.values import is_channels_last

__all__ = ["NoChannel", "Outbox", "Receiver", "Sender", "open_channels"]


HEADER_BYTES = 8192
"""Size of the first frame of every message, so that it can be received without knowing what comes.
What does not fit follows in a second one."""
SMALL_BYTES = 4096
"""Tensors up to this size travel packed into one buffer, larger ones from their own memory."""
_LENGTH = 4  # bytes at the start of a frame that hold the header's length


class Outbox(Protocol):
    """Where a rank's last stage sends what it makes."""

    def send(self, message: Message) -> int:
        """Send on; waits while the message before is still on its way.

        Returns:
            Bytes sent.
        """

    def close(self) -> None:
        """Wait until everything has left."""


class NoChannel:
    """The last rank has nobody to send to."""

    def send(self, message: Message) -> int:
        """Do nothing."""
        return 0

    def close(self) -> None:
        """Do nothing."""


class Sender:
    """Sends messages to the next rank, in the background.

    Args:
        peer: The next rank.
        timeline: Where waiting is recorded.
        stage: The last stage of this rank, for the record.
        ranks: Knows the process groups.
    """

    def __init__(self, peer: int, timeline: Timeline, stage: int, ranks: ManyRanks) -> None:
        self._peer, self._timeline, self._stage = peer, timeline, stage
        self._headers, self._data = ranks.headers, ranks.data
        # Work and the tensors it reads, oldest first.
        self._in_flight: deque[tuple[list[dist.Work | None], list[Tensor]]] = deque()

    def send(self, message: Message) -> int:
        """Send on; waits while the message before is still on its way (back-pressure).

        Returns:
            Bytes sent.

        Raises:
            LinkError: if the next rank is gone.
        """
        header, tensors = encode(message)
        small, large = divide(tensors)
        frames, buffers = make_frames(header), [*small, *large]
        self._settle(message.step)
        try:
            work = [dist.isend(frame, self._peer, group=self._headers) for frame in frames]
            work += [dist.isend(buffer, self._peer, group=self._data) for buffer in buffers]
        except RuntimeError as error:
            raise _lost(self._peer, error) from error
        self._in_flight.append((work, [*frames, *buffers]))
        return sum(buffer.nbytes for buffer in (*frames, *buffers))

    def close(self) -> None:
        """Wait until everything has left."""
        self._settle(-1)

    def _settle(self, step: int) -> None:
        """Wait for what is on its way; its buffers are free afterwards."""
        begin = time.perf_counter()
        while self._in_flight:
            work, _ = self._in_flight[0]
            try:
                _wait(work)
            except RuntimeError as error:
                raise _lost(self._peer, error) from error
            self._in_flight.popleft()
        end = time.perf_counter()
        if end - begin > 1e-4:
            self._timeline.add("wait", self._stage, step, begin, end)


class Receiver:
    """Receives messages from the rank before, ahead of their use.

    Args:
        peer: The rank before.
        timeline: Where waiting is recorded.
        stage: The first stage of this rank, for the record.
        ranks: Knows the process groups, and whether the run has failed elsewhere.
    """

    def __init__(
        self,
        peer: int,
        timeline: Timeline,
        stage: int,
        ranks: ManyRanks,
    ) -> None:
        self._peer, self._timeline, self._stage = peer, timeline, stage
        self._headers, self._data = ranks.headers, ranks.data
        self._device, self._check = ranks.device, ranks.check
        # One message is on its way, the others have arrived and wait.
        self._free = threading.Semaphore(ranks.depth - 1)
        self._arrived: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        # A daemon, because a receive that never comes cannot be taken back.
        self._thread = threading.Thread(target=self._run, name=f"receive-{peer}", daemon=True)
        self._thread.start()

    def receive(self) -> Message:
        """Take the next message.

        Raises:
            LinkError: if the rank before is gone.
        """
        begin = time.perf_counter()
        while True:
            try:
                item = self._arrived.get(timeout=0.2)
                break
            except queue.Empty:
                self._check()
        if isinstance(item, Exception):
            raise item
        end = time.perf_counter()
        if end - begin > 1e-4:
            self._timeline.add("wait", self._stage, item.step, begin, end)
        self._free.release()
        return item

    def _run(self) -> None:
        # Waiting for the next message on the common stream would hold up this one's computing.
        stream = _own_stream(self._device)
        try:
            while True:
                self._free.acquire()
                with torch.cuda.stream(stream):
                    message, tensors = self._receive_one()
                if stream is not None:
                    stream.synchronize()
                    for tensor in tensors:
                        tensor.record_stream(torch.cuda.default_stream(self._device))
                self._arrived.put(message)
                if isinstance(message, Stop):
                    return
        except RuntimeError as error:
            self._arrived.put(_lost(self._peer, error))
        except Exception as error:  # a damaged header: the main thread must see it
            self._arrived.put(error)

    def _receive_one(self) -> tuple[Message, list[Tensor]]:
        frames = [self._receive_frame(HEADER_BYTES)]
        if missing := missing_bytes(frames[0]):
            frames.append(self._receive_frame(missing))
        header, begin = read_frames(frames), time.perf_counter()
        specs, build = decode(header)
        tensors = [spec.empty(self._device) for spec in specs]
        small = [tensor for tensor in tensors if tensor.nbytes <= SMALL_BYTES]
        large = [tensor for tensor in tensors if tensor.nbytes > SMALL_BYTES]
        packed = torch.empty(
            sum(tensor.nbytes for tensor in small), dtype=torch.uint8, device=self._device
        )
        buffers = [*([packed] if len(packed) else []), *map(as_bytes, large)]
        _wait([dist.irecv(buffer, self._peer, group=self._data) for buffer in buffers])
        offset = 0
        for tensor in small:
            as_bytes(tensor).copy_(packed[offset : offset + tensor.nbytes])
            offset += tensor.nbytes
        message = build(tensors)
        self._timeline.add("receive", self._stage, message.step, begin, time.perf_counter())
        return message, tensors

    def _receive_frame(self, size: int) -> Tensor:
        frame = torch.empty(size, dtype=torch.uint8)
        _wait([dist.irecv(frame, self._peer, group=self._headers)])
        return frame


def open_channels(
    ranks: Ranks, timeline: Timeline, hosted: range
) -> tuple[Receiver | None, Outbox]:
    """Open a rank's channels from and to its neighbours; the only rank has none.

    Args:
        ranks: The ranks.
        timeline: Where waiting is recorded.
        hosted: The stages of this rank.
    """
    if not isinstance(ranks, ManyRanks):
        return None, NoChannel()
    mesh, inbox, outbox = ranks.mesh, None, NoChannel()
    if not mesh.is_first:
        inbox = Receiver(mesh.rank - 1, timeline, hosted.start, ranks)
    if not mesh.is_last:
        return inbox, Sender(mesh.rank + 1, timeline, hosted.stop - 1, ranks)
    return inbox, outbox


def _wait(work: list[dist.Work | None]) -> None:
    for item in work:
        assert item is not None, "this rank is in the group"
        item.wait()


def _own_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _lost(peer: int, error: Exception) -> LinkError:
    lost = LinkError(
        "Neighbouring ranks must stay connected",
        f"The link to rank {peer} broke: {str(error).splitlines()[0]}",
    )
    lost.peer = peer
    return lost


def divide(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Pack the small tensors into one buffer of bytes; leave the large ones where they are."""
    small = [t for t in tensors if t.nbytes <= SMALL_BYTES and t.numel()]
    large = [as_bytes(t) for t in tensors if t.nbytes > SMALL_BYTES]
    return ([torch.cat([as_bytes(t) for t in small])] if small else []), large


def as_bytes(tensor: Tensor) -> Tensor:
    """See a dense tensor as bytes, as they lie in memory: gloo and NCCL do not know every type."""
    plain = tensor.detach()
    if is_channels_last(plain):
        plain = plain.permute(0, 2, 3, 1)
    return plain.contiguous().reshape(-1).view(torch.uint8)


def make_frames(header: bytes) -> list[Tensor]:
    """Put a header into a frame, ``uint8 [HEADER_BYTES]``; what does not fit follows in a second.

    The losses of every stage travel with each message, so many stages make headers long.
    """
    raw = len(header).to_bytes(_LENGTH, "little") + header
    frame = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    first = bytearray(raw[:HEADER_BYTES])
    frame[: len(first)] = torch.frombuffer(first, dtype=torch.uint8)
    rest = bytearray(raw[HEADER_BYTES:])
    return [frame, torch.frombuffer(rest, dtype=torch.uint8)] if rest else [frame]


def missing_bytes(frame: Tensor) -> int:
    """How many bytes of the header follow in a second frame."""
    length = int.from_bytes(frame[:_LENGTH].numpy().tobytes(), "little")
    return max(0, length - (HEADER_BYTES - _LENGTH))


def read_frames(frames: list[Tensor]) -> bytes:
    """Take the header out of its frames."""
    raw = b"".join(frame.numpy().tobytes() for frame in frames)
    return raw[_LENGTH : _LENGTH + int.from_bytes(raw[:_LENGTH], "little")]
