"""Where the ranks of a job meet, and who can reach them there.

Ranks find each other through a store that rank 0 serves. It trusts whoever connects, and so do gloo and NCCL, so that
everything listens on as few networks as can be: on one machine on the loopback interface alone, on several on the
address that MASTER_ADDR gives. (Where that is a name, torch listens on all of rank 0's networks: on other nodes the
name may stand for another of its addresses. torchrun's agent, which serves the store itself, always listens on all.)
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import MutableMapping
from datetime import timedelta
from pathlib import Path

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from megalite.errors import UserError

STORE_SOCKET = "MEGALITE_STORE_SOCKET"
"""Rank 0's environment: the descriptor of a socket that a launcher has made for the store and that listens already."""
_BACKLOG = 4096
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def open_store(rank: int, size: int, timeout: timedelta, environment: MutableMapping[str, str] = os.environ) -> Store:
    """The store of a job whose ranks have MASTER_ADDR and MASTER_PORT, and come within `timeout`.

    On one machine gloo and NCCL are restricted to it as well, unless the environment names an interface.
    """
    if size == 1:
        return HashStore()
    host, text = environment["MASTER_ADDR"], environment.get("MASTER_PORT", "")
    if not text.isdecimal() or not 0 < int(text[:6]) < 65536:
        raise UserError(
            f"MASTER_PORT = {text[:40]!r} is not a port; start the ranks with launch/local.sh, torchrun or SLURM"
        )
    port = int(text)
    if _on_one_machine(host, size, environment) and Path("/sys/class/net/lo").exists():
        for name in _INTERFACES:
            environment.setdefault(name, "lo")
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"megalite/{attempt}", TCPStore(host, port, None, False, timeout, wait_for_workers=False))
    descriptor = _listening_socket(host, port, environment) if rank == 0 else None
    return TCPStore(host, port, None, rank == 0, timeout, wait_for_workers=False, master_listen_fd=descriptor)


def _on_one_machine(host: str, size: int, environment: MutableMapping[str, str]) -> bool:
    """Launchers tell how many ranks they start on a machine; without that, nobody else can reach a loopback address."""
    if "LOCAL_WORLD_SIZE" in environment:
        return environment["LOCAL_WORLD_SIZE"] == str(size)
    address = _address(host)
    return address is not None and address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that `host` is, not one that a name stands for today and here; but localhost means itself."""
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return None


def _listening_socket(host: str, port: int, environment: MutableMapping[str, str]) -> int | None:
    """Descriptor of a socket that listens on that address alone; None leaves it to torch, which listens on all."""
    if made := environment.pop(STORE_SOCKET, ""):
        return int(made)
    address = _address(host)
    if address is None:
        return None
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((str(address), port))
        except OSError:  # not an address of this machine (behind NAT, say), or torch can tell better what is wrong
            return None
        listener.listen(_BACKLOG)
        return listener.detach()
