"""What /proc tells of the processes that a test has started."""

from __future__ import annotations

import contextlib
import ipaddress
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

LISTENS = "0A"


def descendants(root: int) -> set[int]:
    """`root` and all processes that it, or one of them, has started; the orphans among them are not found."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, new = set(), {root}
    while new:
        found |= new
        new = {process for process, parent in parents.items() if parent in new} - found
    return found


def is_running(process: int | str) -> bool:
    """Whether it is there, and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def listening(processes: set[int]) -> Iterator[tuple[str, str]]:
    """(address, command line) of every TCP socket on which one of the processes listens."""
    inodes = {}
    for process in processes:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes[str(descriptor.readlink())] = command
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENS and f"socket:[{words[9]}]" in inodes:
                host, _, port = words[1].partition(":")
                yield f"{_address(host)}:{int(port, 16)}", inodes[f"socket:[{words[9]}]"]


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The kernel writes an address as 32-bit words in the machine's order."""
    words = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.rpartition(":")[0]).is_loopback


def sockets_of(process: subprocess.Popen[str], seconds: float) -> dict[str, str]:
    """Everything on which a process and its descendants listen until it ends: {address: command line}."""
    seen: dict[str, str] = {}
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        seen |= dict(listening(descendants(process.pid)))
        assert time.monotonic() < deadline, f"not over after {seconds:.0f} s"
        time.sleep(0.2)
    return seen
