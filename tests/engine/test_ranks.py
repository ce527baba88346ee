"""How ranks tell each other things, and how they agree on the first cause of a failure.

Two ranks live in this process and share one store; process groups are not needed for that.
"""

import threading
import time

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from scpl.engine import ranks as module
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import ManyRanks, OneRank, choose_backend, connect, local_cuda
from scpl.errors import InputError, LinkError, RemoteError

CPU = torch.device("cpu")


@pytest.fixture
def store():
    return HashStore()


@pytest.fixture
def pair(monkeypatch, store):
    """Two ranks; their watchdogs are asked to end the process only after minutes."""
    monkeypatch.setattr(module.dist, "new_group", lambda **_: object())
    monkeypatch.setattr("scpl.engine.watchdog.GRACE", 300.0)
    monkeypatch.setattr("scpl.engine.watchdog.PERIOD", 0.02)
    monkeypatch.setattr(module, "BLAME", 0.3)
    made = [
        ManyRanks(Mesh(rank, 2), CPU, 2, lambda: PrefixStore("test", store), 60.0)
        for rank in range(2)
    ]
    yield made
    for one in made:
        one._watchdog.close()


def test_what_one_shares_the_other_fetches_even_if_it_asked_first(pair):
    first, last = pair
    threading.Timer(0.1, first.share, ["key", {"a": [1, None]}]).start()
    assert last.fetch("key") == {"a": [1, None]}
    assert first.fetch("key") == {"a": [1, None]}


def test_an_exchange_gives_everyone_all_values_in_the_order_of_the_ranks(pair):
    found = {}

    def run(rank):
        for turn in range(3):
            found[rank, turn] = pair[rank].exchange("same key", [rank, turn])

    threads = [threading.Thread(target=run, args=[rank]) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {(r, t): [[0, t], [1, t]] for r in range(2) for t in range(3)}


def test_nothing_is_left_that_all_have_read(pair, store):
    """The store kept a note more for every epoch and rank."""
    first, last = pair
    counts = []
    for turn in range(4):
        other = threading.Thread(target=last.exchange, args=["key", turn])
        other.start()
        first.exchange("key", turn)
        other.join(20)
        last.share(f"usage/{turn}", turn)
        assert first.take(f"usage/{turn}") == turn
        counts.append(len([key for key in store.list_keys() if "value" in key]))
    assert counts[-1] == counts[-2] == counts[-3]


def test_the_first_cause_wins_and_interrupts_who_waits(pair):
    first, last = pair
    assert last.fail(ValueError("mine"), "Rank 1: mine")
    assert not first.fail(ValueError("later"), "Rank 0: later")
    with pytest.raises(RemoteError, match="Rank 1: mine"):
        first.fetch("never shared")


def test_a_broken_link_is_only_a_symptom(pair):
    """Whoever lost a neighbour waits a moment for the neighbour's own words."""
    first, last = pair
    lost = LinkError("Neighbouring ranks must stay connected", "The link to rank 1 broke")
    lost.peer = 1
    threading.Timer(0.1, last.fail, [ValueError("x"), "Rank 1: the real cause"]).start()
    assert not first.fail(lost, "Rank 0: a link broke")
    assert first._watchdog.failure["text"] == "Rank 1: the real cause"


def test_a_neighbour_that_says_nothing_is_named_with_host_and_process(pair):
    first, _ = pair
    lost = LinkError("Neighbouring ranks must stay connected", "The link to rank 1 broke")
    lost.peer = 1
    assert first.fail(lost, "Rank 0: a link broke")
    assert "Rank 1 (process " in str(lost)
    assert "left without a word" in str(lost)


def test_an_error_that_came_from_elsewhere_is_nobodys_first_cause(pair):
    assert not pair[0].fail(RemoteError("Another rank failed"), "told there")


def test_a_silent_rank_counts_as_lost(monkeypatch):
    monkeypatch.setattr(module.dist, "new_group", lambda **_: object())
    monkeypatch.setattr("scpl.engine.watchdog.GRACE", 300.0)
    monkeypatch.setattr("scpl.engine.watchdog.PERIOD", 0.02)
    store = HashStore()
    alone = ManyRanks(Mesh(0, 2), CPU, 2, lambda: PrefixStore("test", store), 0.3)
    try:
        begin = time.monotonic()
        with pytest.raises(RemoteError, match=r"sign of life within 0\.3 s. Rank 1"):
            alone.fetch("never shared")
        assert time.monotonic() - begin < 20
    finally:
        alone._watchdog.close()


def test_a_store_that_is_gone_is_the_end_of_who_hosts_it(pair, monkeypatch):
    """It was an error of torch, with a traceback."""
    first, last = pair
    monkeypatch.setattr(last._notes, "exists", lambda name: gone())

    def gone():
        raise RuntimeError("Connection reset by peer")

    with pytest.raises(LinkError, match=r"must stay until the end. It is gone: Connection reset"):
        last.fetch("key")
    assert first.fail(ValueError("x"), "Rank 0: no such file")
    with pytest.raises(RemoteError, match="Rank 0: no such file"):
        last.fetch("key")


def test_who_hosts_the_store_stays_until_all_know_the_cause(pair, monkeypatch):
    """It ended at once; another rank saw a broken connection, a traceback and an abort."""
    first, last = pair
    monkeypatch.setattr(module, "BLAME", 60.0)
    first._hosts_store = True
    ending = threading.Thread(target=first.fail, args=[ValueError("x"), "Rank 0: no such file"])
    ending.start()
    with pytest.raises(RemoteError, match="Rank 0: no such file") as caught:
        last.fetch("key")
    assert ending.is_alive(), "nobody could read the cause any more"
    assert not last.fail(caught.value, "")
    ending.join(20)
    assert not ending.is_alive()


def test_one_rank_talks_to_itself():
    ranks = OneRank()
    ranks.share("key", 3)
    assert ranks.fetch("key") == 3
    assert ranks.exchange("key", 4) == [4]
    assert ranks.fail(ValueError("x"), "text")
    tensor = torch.ones(2)
    ranks.broadcast(tensor, 0)
    ranks.hurry()
    ranks.close()
    assert torch.equal(tensor, torch.ones(2))


def test_python_alone_is_one_rank_on_the_device_that_is_asked_for(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = connect("meta")
    assert isinstance(ranks, OneRank)
    assert ranks.device == torch.device("meta")
    assert ranks.mesh == Mesh()


@pytest.mark.parametrize("depth", [1, 0, -2])
def test_one_message_travels_while_another_is_worked_on(monkeypatch, depth):
    monkeypatch.setattr(module.dist, "new_group", lambda **_: object())
    with pytest.raises(InputError, match=f"`depth` must be at least 2.*Got {depth}"):
        ManyRanks(Mesh(0, 2), CPU, depth, lambda: PrefixStore("test", HashStore()), 60.0)


A, B, CPUS = ["cuda", "host", "1"], ["cuda", "host", "2"], ["cpu", "host", ""]
ELSEWHERE = ["cuda", "other", "1"]


class TestBackend:
    @pytest.fixture(autouse=True)
    def nccl(self, monkeypatch):
        monkeypatch.setattr(module.dist, "is_nccl_available", lambda: True)

    @pytest.mark.parametrize(
        ("devices", "chosen"),
        [
            ([A, B], "nccl"),
            ([A, ELSEWHERE], "nccl"),
            ([A, B, A], "gloo"),
            ([CPUS, CPUS], "gloo"),
            ([A, CPUS], "gloo"),
        ],
    )
    def test_nccl_is_for_ranks_with_a_device_each(self, devices, chosen):
        assert choose_backend(devices, None) == chosen
        assert choose_backend(devices, "gloo") == "gloo"
        if chosen == "nccl":
            assert choose_backend(devices, "nccl") == "nccl"

    @pytest.mark.parametrize(
        ("devices", "got"),
        [
            ([B, A, A], r"Ranks 1 and 2 share a device\. Start as many processes"),
            ([A, CPUS], r"Rank 1 computes on cpu\. Use gloo"),
        ],
    )
    def test_nccl_is_refused_to_others(self, devices, got):
        with pytest.raises(InputError, match=rf"device to themselves\. {got}"):
            choose_backend(devices, "nccl")

    def test_a_build_without_nccl_uses_gloo(self, monkeypatch):
        monkeypatch.setattr(module.dist, "is_nccl_available", lambda: False)
        assert choose_backend([A, B], None) == "gloo"
        with pytest.raises(InputError, match="This build of torch has no NCCL"):
            choose_backend([A, B], "nccl")

    def test_other_backends_are_unknown(self):
        with pytest.raises(InputError, match=r"backend must be one of: gloo, nccl\. Got 'mpi'"):
            connect(backend="mpi")

    @pytest.mark.parametrize(
        ("device", "backend", "staged"),
        [("cuda", "gloo", True), ("cuda", "nccl", False), ("cpu", "gloo", False)],
    )
    def test_gloo_moves_only_memory_of_the_host(self, monkeypatch, device, backend, staged):
        monkeypatch.setattr(module.dist, "new_group", lambda **_: object())
        store = HashStore()
        one = ManyRanks(
            Mesh(0, 2), torch.device(device), 2, lambda: PrefixStore("t", store), 60.0, backend
        )
        one._watchdog.close()
        assert one.staged == staged


@pytest.mark.parametrize(("rank", "index"), [("0", 0), ("1", 1), ("2", 0), ("5", 1), (None, 1)])
def test_ranks_of_a_machine_take_its_devices_in_turn(monkeypatch, rank, index):
    """Without a launcher it is the device that the caller has chosen."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert local_cuda() == torch.device("cuda", index)


def test_without_a_device_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="CUDA needs a device"):
        connect("cuda")


def test_what_a_rank_receives_and_what_it_sends_have_groups_of_their_own(monkeypatch):
    """They are used in two threads; both ends of a link know the same one."""
    groups = iter(range(100))
    monkeypatch.setattr(module.dist, "new_group", lambda *_, **__: next(groups))
    made = []
    for rank in range(3):
        groups = iter(range(100))  # in each process by itself
        store = HashStore()
        made.append(ManyRanks(Mesh(rank, 3), CPU, 2, lambda s=store: PrefixStore("t", s), 60.0))
        made[-1]._watchdog.close()
    for rank in range(2):
        assert made[rank].link(rank, rank + 1) == made[rank + 1].link(rank, rank + 1)
    assert made[1].link(0, 1) != made[1].link(1, 2)
