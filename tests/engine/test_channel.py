"""What is sent is what arrives, in order, and a slow receiver holds the sender back."""

import queue
import threading
import time
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scpl.engine import channel as module
from scpl.engine.channel import (
    HEADER_BYTES,
    SMALL_BYTES,
    Line,
    NoChannel,
    Receiver,
    Sender,
    Stager,
    divide,
    make_frames,
    missing_bytes,
    open_channels,
    read_frames,
)
from scpl.engine.mesh import Mesh
from scpl.engine.messages import EvalBatch, LocalLoss, Stop, TrainBatch
from scpl.engine.ranks import OneRank
from scpl.engine.timeline import Timeline
from scpl.errors import InputError, LinkError
from scpl.partition.values import TensorSpec, dense

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


class Network:
    """Stands for torch.distributed between two ranks: two groups, each a queue of buffers.

    What is sent counts as gone only when it was received, as with a real link that is full.
    """

    def __init__(self):
        self.queues = {"headers": queue.SimpleQueue(), "data": queue.SimpleQueue()}
        self.broken = threading.Event()

    def isend(self, tensor, peer, group):
        if self.broken.is_set():
            raise RuntimeError("Connection closed by peer")
        taken = threading.Event()
        self.queues[group].put((tensor, taken))

        def wait():
            while not taken.wait(0.05):
                if self.broken.is_set():
                    raise RuntimeError("Connection closed by peer")

        return Work(wait)

    def irecv(self, tensor, peer, group):
        def wait():
            while not self.broken.is_set():
                try:
                    sent, taken = self.queues[group].get(timeout=0.05)
                except queue.Empty:
                    continue
                assert sent.shape == tensor.shape, "a buffer of the right size was made"
                tensor.copy_(sent)
                taken.set()
                return
            raise RuntimeError("Connection closed by peer")

        return Work(wait)


class Work:
    def __init__(self, wait):
        self.wait = wait


class Ranks:
    """What a channel asks of the ranks."""

    headers, device = "headers", torch.device("cpu")

    def __init__(self, depth=2, failure=None, *, staged=False):
        self.depth, self.failure, self.staged = depth, failure, staged
        self.mesh = Mesh(0, 2)

    def link(self, sender, receiver):
        return "data"

    def check(self):
        if self.failure:
            raise self.failure


@pytest.fixture
def network(monkeypatch):
    made = Network()
    monkeypatch.setattr(module.dist, "isend", made.isend)
    monkeypatch.setattr(module.dist, "irecv", made.irecv)
    yield made
    made.broken.set()


@pytest.fixture(params=[False, True], ids=["direct", "staged"])
def staged(request):
    """Whether tensors go by way of other buffers, as between CUDA devices over gloo."""
    return request.param


def ends(depth=2, *, staged=False):
    ranks = Ranks(depth, staged=staged)
    return Sender(1, Timeline(), 0, ranks), Receiver([0], Timeline(1), 1, ranks)


def finish(sender, receiver):
    """Let the threads of both ends come to their end."""
    threading.Thread(target=receive_all, args=[receiver]).start()
    sender.send(Stop(0))
    sender.close()
    receiver._thread.join(10)
    assert not receiver._thread.is_alive()


def receive_all(receiver):
    while not isinstance(receiver.receive(), Stop):
        pass


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.sampled_from([0, 1, 3, 40]), max_size=4)),
        max_size=6,
    )
)
@pytest.mark.parametrize("staged", [False, True])
def test_any_message_survives_the_way(staged, parts):
    """Small tensors travel packed, large ones by themselves; the receiver knows only the frame."""
    with pytest.MonkeyPatch.context() as patch:
        made = Network()
        patch.setattr(module.dist, "isend", made.isend)
        patch.setattr(module.dist, "irecv", made.irecv)
        sender, receiver = ends(staged=staged)
        sent = [torch.randint(0, 2, shape).to(dtype) for dtype, shape in parts]
        sent += [t.to(memory_format=torch.channels_last) for t in sent if t.ndim == 4]
        sender.send(EvalBatch(3, sent, None))
        message = receiver.receive()
        assert message.step == 3
        assert [TensorSpec.of(t) for t in message.features] == [TensorSpec.of(t) for t in sent]
        for one, other in zip(message.features, sent, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == dense(other).stride()
        finish(sender, receiver)


def test_messages_arrive_in_order_with_all_their_fields(network, staged):
    sender, receiver = ends(depth=4, staged=staged)
    loss = LocalLoss({"a": torch.tensor(1.0)}, {"b": torch.tensor(2.0)})
    for step in range(1, 4):
        sender.send(TrainBatch(step, torch.ones(2, 3) * step, torch.arange(2), losses=(loss,)))
    for step in range(1, 4):
        message = receiver.receive()
        assert (type(message), message.step) == (TrainBatch, step)
        assert torch.equal(message.features, torch.ones(2, 3) * step)
        assert message.losses[0].observed["b"] == 2
    finish(sender, receiver)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_at_most_depth_messages_are_in_flight(network, depth, staged):
    sender, receiver = ends(depth, staged=staged)
    sent = []

    def send_all():
        for step in range(1, 12):
            sender.send(EvalBatch(step, torch.zeros(2), None))
            sent.append(step)

    thread = threading.Thread(target=send_all)
    thread.start()
    for taken in range(11):
        # What is not taken yet waits on the receiver's side, on the way, or in the sender's hands.
        assert len(sent) - taken <= depth + 1
        assert receiver.receive().step == taken + 1
    thread.join(10)
    finish(sender, receiver)


def test_a_sender_that_waits_says_so(network, staged):
    sender, receiver = ends(staged=staged)
    threading.Timer(0.2, receiver.receive).start()
    for step in range(1, 4):  # one is taken, one waits there, one is on its way
        sender.send(EvalBatch(step, torch.zeros(2), None))
    assert sender._timeline.seconds().get("wait", 0.0) > 0.05
    receiver.receive()
    finish(sender, receiver)


def test_a_broken_link_names_the_peer_on_both_sides(network):
    sender, receiver = ends()
    network.broken.set()
    with pytest.raises(LinkError, match=r"must stay connected.*rank 1 broke") as caught:
        sender.send(EvalBatch(1, torch.zeros(2), None))
    assert caught.value.peer == 1
    with pytest.raises(LinkError, match="rank 0 broke") as caught:
        receiver.receive()
    assert caught.value.peer == 0


def test_a_broken_link_names_the_peer_when_the_next_message_follows(network):
    """Whoever computes has long gone on when a staged message finds the link broken."""
    sender, receiver = ends(staged=True)
    network.broken.set()
    sender.send(EvalBatch(1, torch.zeros(2), None))
    with pytest.raises(LinkError, match=r"must stay connected.*rank 1 broke") as caught:
        sender.send(EvalBatch(2, torch.zeros(2), None))
    assert caught.value.peer == 1
    with pytest.raises(LinkError, match="rank 1 broke"):
        sender.close()
    with pytest.raises(LinkError, match="rank 0 broke"):
        receiver.receive()


def test_who_computes_does_not_wait_for_the_copy(network, monkeypatch):
    """A copy waits until the device has computed the tensor; here it waits for us."""
    computed = threading.Event()

    def slowly(like):
        assert computed.wait(10)
        return torch.empty_like(like)

    sender, receiver = ends(staged=True)
    monkeypatch.setattr(module, "on_host", slowly)
    sent = torch.zeros(SMALL_BYTES)
    sender.send(EvalBatch(1, sent, None))
    sent.fill_(1)  # what the device computes meanwhile
    computed.set()
    assert torch.equal(receiver.receive().features, torch.ones(SMALL_BYTES))
    finish(sender, receiver)


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_a_device_that_fails_is_no_broken_link(network, monkeypatch, end):
    """Else the neighbour would be blamed for it."""
    sender, receiver = ends(staged=True)
    broken = sender._stager._thread if end == "sender" else receiver._thread

    def fail(like):
        if threading.current_thread() is broken:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.empty_like(like)

    monkeypatch.setattr(module, "on_host", fail)
    sender.send(EvalBatch(1, torch.zeros(2), None))
    with pytest.raises(torch.OutOfMemoryError):
        (sender.close if end == "sender" else receiver.receive)()
    network.broken.set()
    if end == "receiver":
        with pytest.raises(LinkError):
            sender.close()


def test_what_was_staged_is_given_up(network):
    """The device needs its memory while the message still travels."""
    sender, receiver = ends(staged=True)
    tensor = torch.zeros(SMALL_BYTES)
    gone = weakref.ref(tensor.untyped_storage())
    sender.send(EvalBatch(1, torch.zeros(2), None))  # nobody takes it, so the next one waits
    sender.send(EvalBatch(2, tensor, None))
    del tensor
    deadline = time.monotonic() + 10
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone() is None
    finish(sender, receiver)


class Stream:
    """Stands for a stream of a device, and writes down what it is asked."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        self.log.append(f"{self.name} records")
        return "computed"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits until {event}")

    def synchronize(self):
        self.log.append(f"host waits for {self.name}")


@pytest.fixture
def cuda(monkeypatch):
    """A device whose calls are written down, with who made them; tensors stay on the CPU."""
    log, used = [], []
    monkeypatch.setattr(
        module, "use_device", lambda device: used.append(threading.current_thread())
    )
    monkeypatch.setattr(module, "own_stream", lambda device: Stream("own", log))
    monkeypatch.setattr(
        module, "on_host", lambda like: log.append("copy") or torch.empty_like(like)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: log.append(f"{stream.name} uses it")
    )
    return log, used


def test_a_copy_waits_for_what_is_computed_and_a_send_for_the_copy(network, monkeypatch, cuda):
    log, used = cuda
    isend = network.isend
    monkeypatch.setattr(
        module.dist, "isend", lambda *a, group: log.append(f"send {group}") or isend(*a, group)
    )
    line = Line(1, "headers", "data")
    stager = Stager(line, torch.device("cuda"))
    settle = stager.post([torch.zeros(1)], [torch.zeros(2), torch.zeros(3)])
    for group in ("headers", "data", "data"):
        network.queues[group].get(timeout=10)[1].set()
    settle()
    thread = stager._thread
    stager.close()
    assert used == [thread], "a thread begins with the first device"
    assert log == [
        "computing records", "own waits until computed", "copy", "copy", "host waits for own",
        "send headers", "send data", "send data",
    ]  # fmt: skip


def test_what_is_received_belongs_to_the_stream_that_uses_it(network, monkeypatch, cuda):
    """It was made on another one, which must not give the memory away before."""
    log, used = cuda
    monkeypatch.setattr(TensorSpec, "empty", lambda s, device: torch.empty(s.shape, dtype=s.dtype))
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device="cpu", **o: real(*a, **o))
    sender, receiver = ends()
    receiver._device = torch.device("cuda")
    sender.send(EvalBatch(1, torch.zeros(2), torch.zeros(2, dtype=torch.int64)))
    assert torch.equal(receiver.receive().features, torch.zeros(2))
    assert used == [receiver._thread]
    assert log[:3] == ["host waits for own", "computing uses it", "computing uses it"]
    finish(sender, receiver)


def test_a_damaged_header_reaches_the_main_thread(network):
    sender, receiver = ends()
    for frame in make_frames(b"no header"):
        network.isend(frame, 1, "headers")
    with pytest.raises(InputError, match="readable header"):
        receiver.receive()
    sender.close()


def test_who_waits_for_a_message_hears_of_a_failure_elsewhere(network):
    ranks = Ranks(failure=RuntimeError("rank 3 failed"))
    receiver = Receiver([0], Timeline(), 1, ranks)
    with pytest.raises(RuntimeError, match="rank 3 failed"):
        receiver.receive()


def test_the_only_rank_has_no_channels():
    inbox, outbox = open_channels(OneRank(), Timeline(), range(4), [None] * 4)
    assert inbox is None
    assert isinstance(outbox, NoChannel)
    assert outbox.send(Stop(0)) == 0


def test_large_tensors_are_not_copied():
    tensor = torch.zeros(SMALL_BYTES)
    small, (large,) = divide([tensor])
    assert small == []
    assert large.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("size", [0, 5, HEADER_BYTES - 4, HEADER_BYTES - 3, 9000, 100_000])
def test_a_header_of_any_length_travels(size):
    """The losses and observations of 32 stages make a header of 9,121 bytes, and were refused."""
    header = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    frames = make_frames(header)
    assert [frame.numel() for frame in frames[1:]] == [size + 4 - HEADER_BYTES] * (
        size + 4 > HEADER_BYTES
    )
    assert missing_bytes(frames[0]) == sum(frame.numel() for frame in frames[1:])
    assert read_frames(frames) == header
