"""Notes of ranks: only those that a rank of this run wrote count."""

import socket
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from scpl.engine.local import host_store, local_ranks, variables
from scpl.engine.notes import NOTHING, SECRET, Notes, believed
from scpl.errors import InputError


@pytest.fixture
def store():
    return PrefixStore("test", HashStore())


def test_a_note_is_read_by_who_knows_the_secret(store):
    ours, strangers = Notes(store, "secret"), Notes(store, "another")
    ours.write("name", {"a": [1, None]})
    assert Notes(store, "secret").read("name") == {"a": [1, None]}
    assert strangers.read("name") is NOTHING
    assert ours.read("other") is NOTHING
    ours.remove("name")
    assert not ours.exists("name")


@pytest.mark.parametrize("forged", ["", " ", "{}", "null", "0" * 64 + " 1", "\xff\x00", "é 1"])
def test_what_has_no_seal_is_nothing(store, forged):
    store.set("name", forged)
    notes = Notes(store, "secret")
    assert notes.exists("name")
    assert notes.read("name") is NOTHING
    with pytest.raises(InputError, match=rf"same secret \({SECRET}\)\. Got 'name' with another"):
        believed(notes, "name")


def test_a_note_does_not_count_in_another_place(store):
    notes = Notes(store, "secret")
    notes.write("one", 1)
    store.set("two", store.get("one"))
    assert notes.read("two") is NOTHING


def test_the_first_claim_of_a_rank_counts(store):
    notes = Notes(store, "secret")
    store.set("failure", "a stranger's")
    assert notes.claim("failure", "first") == "first"
    assert notes.claim("failure", "second") == "first"
    assert notes.read("failure") == "first"


def test_the_store_of_one_machine_is_out_of_reach_of_others():
    """It listened on all interfaces."""
    with local_ranks(2, "run") as places:
        port = int(places[0]["MASTER_PORT"])
        assert places[0]["MASTER_ADDR"] == "127.0.0.1"
        assert _listening(port) == {"0100007F"}
        client = TCPStore("127.0.0.1", port, wait_for_workers=False)
        client.set("key", "value")
        assert client.get("key") == b"value"
        del client
    assert _listening(port) == set()
    assert [place["RANK"] for place in places] == ["0", "1"]
    assert len({place[SECRET] for place in places}) == 1
    assert variables(1, 1)[0][SECRET] != places[0][SECRET]


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "0100007F"), ("localhost", "0100007F"), ("::1", "0" * 24 + "01000000")],
)
def test_a_rank_that_hosts_the_store_for_its_own_machine_hides_it_too(host, address):
    """Only an address of four numbers was seen to be that of this machine."""
    store = host_store(host, 0, timedelta(seconds=5))
    assert _listening(store.port) == {address}


def _listening(port):
    """The addresses on which something listens at a port (Linux), in its notation."""
    found = set()
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            address, number = line.split()[1].split(":")
            if int(number, 16) == port and line.split()[3] == "0A":
                found.add(address)
    return found


def test_the_interface_of_this_machine_alone_is_found():
    place = variables(1, 1)[0]
    assert place["GLOO_SOCKET_IFNAME"] in {name for _, name in socket.if_nameindex()}
