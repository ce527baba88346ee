"""Where ranks of one machine meet: at a store that only this machine can reach.

Torch is imported only where a store is made: variables are for processes that have not begun.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from scpl.engine.notes import SECRET

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["host_store", "local_ranks", "variables"]

_ADDRESS = "127.0.0.1"  # and no name: to look one up may take a minute


@contextmanager
def local_ranks(num_ranks: int, run_id: str = "") -> Iterator[list[dict[str, str]]]:
    """Host a store for some ranks of this machine, which its caller starts.

    Args:
        num_ranks: How many.
        run_id: What the launcher calls the run, the same for every attempt at it; if it has a name.

    Yields:
        For each rank the environment variables that tell it how to meet the others.
    """
    store = host_store(_ADDRESS, 0, timedelta(minutes=5))
    hosted = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    if run_id:
        hosted["TORCHELASTIC_RUN_ID"] = run_id
    yield [{**place, **hosted} for place in variables(num_ranks, store.port)]
    del store  # it ends with its last reference


def variables(num_ranks: int, port: int) -> list[dict[str, str]]:
    """Name the environment variables of ranks of this machine, as torchrun sets them.

    They share a secret that nobody else knows.

    Args:
        num_ranks: How many.
        port: Of the store where they meet.
    """
    shared = {
        "MASTER_ADDR": _ADDRESS,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        SECRET: secrets.token_hex(16),
        # What torch warns of there is told by the ranks, in words for people.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    if loopback := _loopback():
        shared["GLOO_SOCKET_IFNAME"] = loopback
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def host_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """Host a store, which others reach at ``host:port``; on loopback only this machine can.

    Args:
        host: The address of this machine.
        port: 0 for any that is free.
        timeout: How long its own calls wait.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    loopback = _loopback_address(host)
    if loopback is None:
        return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout)
    # torch itself would listen on all interfaces.
    family = socket.AF_INET6 if ":" in loopback else socket.AF_INET
    with socket.create_server((loopback, port), family=family) as listening:
        return TCPStore(
            host,
            listening.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listening.detach(),  # the store closes it
        )


def _loopback_address(host: str) -> str | None:
    """The address to listen at, if a name or address is that of this machine for itself."""
    if host == "localhost":  # without looking it up: clients try all that it stands for
        return _ADDRESS
    try:
        return host if ipaddress.ip_address(host).is_loopback else None
    except ValueError:
        return None


def _loopback() -> str:
    """The interface that only this machine can reach; gloo wants its name."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "")
