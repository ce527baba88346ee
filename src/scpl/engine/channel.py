"""The one-way channel between neighbouring ranks.

The rule: one direction, in order, at most `depth` messages in flight; a buffer
lives, unmodified, until its send completes. Because traffic never flows back there is no order of
messages that could deadlock.

Where ranks compute on CUDA but talk over gloo, which moves only memory of the host, tensors are
*staged*: copied to pinned memory, sent, and copied to the other device. Threads of the channel wait
for these copies; the one that computes does not.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from scpl.engine.mesh import Mesh
from scpl.engine.messages import (
    EvalBatch,
    Message,
    Stop,
    TrainBatch,
    decode,
    encode,
    without_earlier,
)
from scpl.engine.ranks import ManyRanks, Ranks
from scpl.engine.shares import check_dimensions, dims_of, held, join_rows, own, take_rows
from scpl.engine.timeline import Timeline
from scpl.engine.transfer import on_host, own_stream, upload, use_device
from scpl.errors import LinkError
from scpl.partition.pieces import Dimensions
from scpl.partition.values import is_channels_last, tensors_of

__all__ = ["Distributor", "NoChannel", "Outbox", "Receiver", "Sender", "open_channels"]


HEADER_BYTES = 8192
"""Size of the first frame of every message, so that it can be received without knowing what comes.
What does not fit follows in a second one."""
SMALL_BYTES = 4096
"""Tensors up to this size travel packed into one buffer, larger ones from their own memory."""
_LENGTH = 4  # bytes at the start of a frame that hold the header's length

Batch = TypeVar("Batch", bound="TrainBatch | EvalBatch")
Settle: TypeAlias = Callable[[], object]
"""Waits until a message has left; its buffers are free afterwards."""


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
        peer: The other rank.
        timeline: Where waiting is recorded.
        stage: The last stage of this rank, for the record.
        ranks: Knows the process groups.
    """

    def __init__(self, peer: int, timeline: Timeline, stage: int, ranks: ManyRanks) -> None:
        self._timeline, self._stage, self._device = timeline, stage, ranks.device
        self._line = Line(peer, ranks.headers, ranks.link(ranks.mesh.rank, peer))
        self._stager = Stager(self._line, ranks.device) if ranks.staged else None
        self._in_flight: deque[Settle] = deque()  # oldest first

    def send(self, message: Message) -> int:
        """Send on; waits while the message before is still on its way (back-pressure).

        Returns:
            Bytes sent.

        Raises:
            LinkError: if the next rank is gone.
        """
        header, tensors = encode(message)
        # Objectives may hand on scalars of the CPU, and small tensors travel together.
        small, large = divide([upload(tensor, self._device) for tensor in tensors])
        frames, buffers = make_frames(header), [*small, *large]
        self._settle(message.step)
        post = self._line.post if self._stager is None else self._stager.post
        self._in_flight.append(post(frames, buffers))
        return sum(buffer.nbytes for buffer in (*frames, *buffers))

    def close(self) -> None:
        """Wait until everything has left."""
        try:
            self._settle(-1)
        except BaseException:
            if self._stager is not None:
                self._stager.close(wait=False)  # it may be waiting for a rank that is gone
            raise
        if self._stager is not None:
            self._stager.close()

    def _settle(self, step: int) -> None:
        """Wait for what is on its way; its buffers are free afterwards."""
        begin = time.perf_counter()
        while self._in_flight:
            self._in_flight[0]()
            self._in_flight.popleft()
        end = time.perf_counter()
        if end - begin > 1e-4:
            self._timeline.add("wait", self._stage, step, begin, end)


@dataclass(frozen=True)
class Line:
    """The way to another rank, or from it.

    Attributes:
        peer: The other rank.
        headers: The process group for frames.
        data: The process group for tensors.
    """

    peer: int
    headers: dist.ProcessGroup
    data: dist.ProcessGroup

    def post(self, frames: list[Tensor], buffers: list[Tensor]) -> Settle:
        """Begin to send a message; what is returned holds its buffers, and waits for the end.

        Raises:
            LinkError: if the other rank is gone, here or later.
        """
        with self.unbroken():
            work = [dist.isend(frame, self.peer, group=self.headers) for frame in frames]
            work += [dist.isend(buffer, self.peer, group=self.data) for buffer in buffers]
        held = [*frames, *buffers]

        def settle() -> None:
            with self.unbroken():
                _wait(work)
            held.clear()

        return settle

    def receive_frame(self, size: int) -> Tensor:
        """Wait for a frame of this size.

        Raises:
            LinkError: if the other rank is gone.
        """
        frame = torch.empty(size, dtype=torch.uint8)
        with self.unbroken():
            _wait([dist.irecv(frame, self.peer, group=self.headers)])
        return frame

    def receive(self, buffers: list[Tensor]) -> None:
        """Fill buffers with what arrives; NCCL has the current stream wait for it.

        Raises:
            LinkError: if the other rank is gone.
        """
        with self.unbroken():
            _wait([dist.irecv(buffer, self.peer, group=self.data) for buffer in buffers])

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Say of an error of the process group which link is broken."""
        try:
            yield
        except RuntimeError as error:
            raise _lost(self.peer, error) from error


@dataclass(frozen=True)
class _Job:
    """A message to be staged.

    Attributes:
        frames: Its header.
        buffers: Its tensors; they live until they are copied.
        computed: Tells the device that the tensors are there; None on the CPU.
        left: Set when the message has left, or could not.
    """

    frames: list[Tensor]
    buffers: list[Tensor]
    computed: torch.cuda.Event | None
    left: Future[None] = field(default_factory=Future)


class Stager:
    """Sends what lies on a CUDA device by way of pinned memory, in order, in a thread of its own.

    Args:
        line: The way to the next rank.
        device: Where the tensors lie; on the CPU they are copied as well.
    """

    def __init__(self, line: Line, device: torch.device) -> None:
        self._line, self._device = line, device
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # A daemon, because a send that nobody receives cannot be taken back.
        self._thread = threading.Thread(target=self._run, name=f"stage-{line.peer}", daemon=True)
        self._thread.start()

    def post(self, frames: list[Tensor], buffers: list[Tensor]) -> Settle:
        """Have a message sent as soon as the current stream has computed it.

        Returns:
            Waits until it has left, and raises what went wrong meanwhile: LinkError if the next
            rank is gone.
        """
        on_device = self._device.type == "cuda"
        computed = torch.cuda.current_stream(self._device).record_event() if on_device else None
        job = _Job(frames, buffers, computed)
        self._jobs.put(job)
        return job.left.result

    def close(self, *, wait: bool = True) -> None:
        """End the thread once all has left, and wait for that."""
        self._jobs.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        use_device(self._device)
        stream = own_stream(self._device)
        while (job := self._jobs.get()) is not None:
            try:
                staged = self._copy(job, stream)
                self._line.post(job.frames, staged)()
            except Exception as error:  # the thread that computes must see it
                job.left.set_exception(error)
            else:
                job.left.set_result(None)
            del job  # or it would be kept while this thread waits for the next one

    def _copy(self, job: _Job, stream: torch.cuda.Stream | None) -> list[Tensor]:
        """Copy a message's tensors to the host, and give up those of the device."""
        with torch.cuda.stream(stream):
            if stream is not None and job.computed is not None:
                stream.wait_event(job.computed)
            staged = [on_host(b).copy_(b, non_blocking=True) for b in job.buffers]
        if stream is not None:
            stream.synchronize()
        job.buffers.clear()
        return staged


@dataclass(frozen=True)
class Cut:
    """What crosses a cut: in which dimensions its rows are.

    Attributes:
        dims: See `Pieces.batch_dims`.
        narrows: Whether it is rounded in training.
    """

    dims: Dimensions = None
    narrows: bool = False

    def dims_of(self, batch: Batch) -> Sequence[int | None]:
        """Say for each tensor of a batch's features which dimension is the batch."""
        narrowed = self.narrows and isinstance(batch, TrainBatch)
        return dims_of(batch.features, self.dims, narrowed=narrowed)


class Receiver:
    """Receives messages from the rank before, ahead of their use.

    Args:
        peers: The rank before; of a group of another size than this rank's, all its ranks.
        timeline: Where waiting is recorded.
        stage: The first stage of this rank, for the record.
        ranks: Knows the process groups, and whether the run has failed elsewhere.
        cut: What several ranks send is like.
    """

    def __init__(
        self,
        peers: Sequence[int],
        timeline: Timeline,
        stage: int,
        ranks: ManyRanks,
        cut: Cut | None = None,
    ) -> None:
        self._timeline, self._stage, self._cut = timeline, stage, cut or Cut()
        me = ranks.mesh.rank
        self._lines = [Line(peer, ranks.headers, ranks.link(peer, me)) for peer in peers]
        self._device, self._staged, self._check = ranks.device, ranks.staged, ranks.check
        # One message is on its way, the others have arrived and wait.
        self._free = threading.Semaphore(ranks.depth - 1)
        self._arrived: queue.SimpleQueue[tuple[Message, list[Tensor]] | Exception]
        self._arrived = queue.SimpleQueue()
        # A daemon, because a receive that never comes cannot be taken back.
        self._thread = threading.Thread(target=self._run, name=f"receive-{peers[0]}", daemon=True)
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
        message, tensors = item
        if self._device.type == "cuda":  # their memory belongs to the stream that received them
            stream = torch.cuda.current_stream(self._device)
            for tensor in tensors:
                tensor.record_stream(stream)
        end = time.perf_counter()
        if end - begin > 1e-4:
            self._timeline.add("wait", self._stage, message.step, begin, end)
        self._free.release()
        return message

    def _run(self) -> None:
        use_device(self._device)
        # Waiting for the next message on the common stream would hold up this one's computing.
        stream = own_stream(self._device)
        try:
            while True:
                self._free.acquire()
                with torch.cuda.stream(stream):
                    message, tensors = self._receive_from_all()
                if stream is not None:
                    stream.synchronize()
                self._arrived.put((message, tensors))
                if isinstance(message, Stop):
                    return
                del message, tensors  # or they would be kept until the next ones are here
        except Exception as error:  # the thread that computes must see it
            self._arrived.put(error)

    def _receive_from_all(self) -> tuple[Message, list[Tensor]]:
        """Receive a message: of a batch each rank before sends some rows, a mark comes of each."""
        message, tensors = self._receive_one(self._lines[0])
        if len(self._lines) == 1:
            return message, tensors
        others = [self._receive_one(line)[0] for line in self._lines[1:]]
        if isinstance(message, (TrainBatch, EvalBatch)):
            parts = [message, *(m for m in others if isinstance(m, (TrainBatch, EvalBatch)))]
            features = join_rows([part.features for part in parts], self._cut.dims_of(message))
            message = replace(message, features=features)
            tensors = [*tensors, *tensors_of(features)]
        return message, tensors

    def _receive_one(self, line: Line) -> tuple[Message, list[Tensor]]:
        frames = [line.receive_frame(HEADER_BYTES)]
        if missing := missing_bytes(frames[0]):
            frames.append(line.receive_frame(missing))
        header, begin = read_frames(frames), time.perf_counter()
        specs, build = decode(header)
        tensors = [spec.empty(self._device) for spec in specs]
        small = [tensor for tensor in tensors if tensor.nbytes <= SMALL_BYTES]
        large = [tensor for tensor in tensors if tensor.nbytes > SMALL_BYTES]
        packed = torch.empty(
            sum(tensor.nbytes for tensor in small), dtype=torch.uint8, device=self._device
        )
        self._fill(line, [*([packed] if len(packed) else []), *map(as_bytes, large)])
        offset = 0
        for tensor in small:
            as_bytes(tensor).copy_(packed[offset : offset + tensor.nbytes])
            offset += tensor.nbytes
        message = build(tensors)
        self._timeline.add("receive", self._stage, message.step, begin, time.perf_counter())
        return message, tensors

    def _fill(self, line: Line, buffers: list[Tensor]) -> None:
        """Receive into buffers; the current stream has what arrived."""
        if not self._staged:
            line.receive(buffers)
            return
        staged = [on_host(buffer) for buffer in buffers]
        line.receive(staged)
        for buffer, arrived in zip(buffers, staged, strict=True):
            buffer.copy_(arrived, non_blocking=True)


@final
class Distributor:
    """Where groups of ranks have replicas: sends to every rank that needs it.

    Batches go to the ranks of the next group, to each the rows that it works on. Marks go there as
    well, and from the first rank also to the other ones of its group, which get their shares of a
    batch by `share_out`.

    Args:
        mesh: Who needs what.
        senders: To each rank that this one sends to, by rank.
        cut: What this rank's last stage hands on is like.
    """

    def __init__(self, mesh: Mesh, senders: Mapping[int, Sender], cut: Cut) -> None:
        self._mesh, self._senders, self._cut = mesh, senders, cut

    def send(self, message: Message) -> int:  # noqa: D102
        if not isinstance(message, (TrainBatch, EvalBatch)):
            siblings = self._mesh.siblings
            return sum(
                sender.send(without_earlier(message) if rank in siblings else message)
                for rank, sender in self._senders.items()
            )
        return sum(
            self._senders[rank].send(self._needed(message, rank)) for rank in self._mesh.targets
        )

    def share_out(self, batch: Batch) -> int:
        """Send the other ranks of the first group their rows of what comes from the data.

        Returns:
            Bytes sent.
        """
        return sum(
            self._senders[rank].send(self._share_of(batch, replica))
            for replica, rank in enumerate(self._mesh.siblings)
            if rank != self._mesh.rank
        )

    def own_share(self, batch: Batch) -> Batch:
        """Take this rank's rows of what comes from the data."""
        return self._share_of(batch, self._mesh.replica)

    def close(self) -> None:  # noqa: D102
        for sender in self._senders.values():
            sender.close()

    def _share_of(self, batch: Batch, replica: int) -> Batch:
        rows = held(batch.rows, self._mesh.num_replicas, replica)
        dims = dims_of(batch.features, None)  # rows come first in what comes from the data
        return replace(batch, features=take_rows(batch.features, dims, rows))

    def _needed(self, batch: Batch, rank: int) -> Batch:
        """Take the rows that a rank of the next group needs of those that are here."""
        mesh, there = self._mesh, self._mesh.groups[self._mesh.group + 1]
        if len(there) == mesh.num_replicas:
            return batch
        here = held(batch.rows, mesh.num_replicas, mesh.replica)
        mine = own(batch.rows, mesh.num_replicas, mesh.replica)
        wanted = held(batch.rows, len(there), rank - there.start)
        start, stop = max(mine.start, wanted.start), min(mine.stop, wanted.stop)
        rows = range(start - here.start, stop - here.start) if start < stop else range(0)
        return replace(batch, features=take_rows(batch.features, self._cut.dims_of(batch), rows))


def open_channels(
    ranks: Ranks,
    timeline: Timeline,
    hosted: range,
    dims: Sequence[Dimensions],
    *,
    narrows: bool = False,
) -> tuple[Receiver | None, Outbox]:
    """Open a rank's channels from and to its neighbours; the only rank has none.

    Args:
        ranks: The ranks.
        timeline: Where waiting is recorded.
        hosted: The stages of this rank.
        dims: For each stage of the network, which dimension is the batch in what it hands on.
        narrows: Whether what it hands on in training is rounded.

    Raises:
        InputError: if ranks with other numbers of replicas follow, and rows cannot be told apart.
    """
    if not isinstance(ranks, ManyRanks):
        return None, NoChannel()
    mesh, inbox = ranks.mesh, None
    if mesh.sources:
        if len(mesh.sources) > 1:
            check_dimensions(dims[hosted.start - 1], hosted.start - 1)
        before = Cut(dims[hosted.start - 1], narrows) if hosted.start else None
        inbox = Receiver(mesh.sources, timeline, hosted.start, ranks, before)
    last = hosted.stop - 1
    if len(mesh.targets) > 1:
        check_dimensions(dims[last], last)
    if mesh.replicas is None:
        peer = next(iter(mesh.targets), None)
        return inbox, NoChannel() if peer is None else Sender(peer, timeline, last, ranks)
    siblings = mesh.siblings[1:] if mesh.is_first else ()
    senders = {rank: Sender(rank, timeline, last, ranks) for rank in (*siblings, *mesh.targets)}
    return inbox, Distributor(mesh, senders, Cut(dims[last], narrows))


def _wait(work: list[dist.Work | None]) -> None:
    for item in work:
        assert item is not None, "this rank is in the group"
        item.wait()


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
