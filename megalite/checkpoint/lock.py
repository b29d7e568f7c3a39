"""One run directory, one job: the lock file `run.lock` names host, process and job of the run that writes there.

The file appears with its whole content at once (a hard link of a finished temporary file). A lock is taken over only
when its holder is known to be gone: the process is dead on this very host, an earlier start or step of the same SLURM
job held it, or a job that SLURM calls over (`MEGALITE_ENDED_JOB`, from the job's script). In every other case the run
is refused: clocks and file times of two machines prove nothing.

What SLURM calls over may live on behind a cut network. So the lock is a fence too: its holder looks at it again before
it changes checkpoints, and ends if it has been taken over; and `token` keeps the unfinished files of two holders apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalite.errors import UserError

LOCK = "run.lock"
ENDED_JOB_ENVIRONMENT = "MEGALITE_ENDED_JOB"
"""Names the SLURM job that holds the lock where SLURM knows that it is over."""


class TakenOver(RuntimeError):
    """A later start has taken the run directory over: this process must not write there any more."""


def _process_start(pid: int) -> str:
    """When a process was started, in the kernel's ticks since boot; empty where it does not run or cannot be asked."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie holds no files and writes nothing any more.
    return "" if fields[0] in "ZX" else fields[19]


def _identity() -> dict[str, Any]:
    job = {name: os.environ.get(f"SLURM_{name.upper()}", "") for name in ("job_id", "restart_count", "step_id")}
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _process_start(pid), **job}


def _alive(pid: int, started: str) -> bool:
    """Whether the process that wrote the lock still runs here; another process of the same number does not count."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _process_start(pid)
    return (now == started) if started and os.path.exists("/proc/self/stat") else True


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _gone(holder: dict[str, Any], own: dict[str, Any]) -> bool:
    if own["job_id"] and holder["job_id"] == own["job_id"]:
        then, now = ((_number(one["restart_count"]), _number(one["step_id"])) for one in (holder, own))
        if now != then:
            return now > then
    elif holder["job_id"] and holder["job_id"] == os.environ.get(ENDED_JOB_ENVIRONMENT):
        return True
    return holder["host"] == own["host"] and not _alive(holder["pid"], holder["started"])


def _describe(holder: dict[str, Any]) -> str:
    job = f", job {holder['job_id']} restart {_number(holder['restart_count'])}" if holder["job_id"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}"


def _read(path: Path) -> dict[str, Any]:
    fields = {"host": str, "pid": int, "started": str, "job_id": str, "restart_count": str, "step_id": str}
    try:
        holder = json.loads(path.read_text())
        if isinstance(holder, dict) and all(isinstance(holder.get(name), kind) for name, kind in fields.items()):
            return holder
    except (OSError, ValueError):
        pass
    raise UserError(f"{path} is not readable as a lock; if no run uses {path.parent}, delete it")


@contextlib.contextmanager
def _alone_on_this_host(directory: Path) -> Iterator[None]:
    """Two runs that start at once on one host look at a stale lock one after the other."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # file systems without flock: the link below still decides
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class RunLock:
    """Held from construction until `release`; raises `UserError` where another run holds the directory."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / LOCK
        self._own = _identity()
        self._acquire()

    @property
    def token(self) -> str:
        """A word for file names that no other living holder has."""
        return f"{self._own['host']}-{self._own['pid']}"

    def _acquire(self) -> None:
        temporary = self.path.with_name(f"{LOCK}.{self.token}")
        with _alone_on_this_host(self.path.parent):
            temporary.write_text(json.dumps(self._own) + "\n")
            try:
                self._take(temporary)
            finally:
                temporary.unlink(missing_ok=True)

    def verify(self) -> None:
        """Raise `TakenOver` if another holds the directory now; a lock that was deleted is made again."""
        if not self.path.exists():
            self._acquire()
        holder = _read(self.path)
        if holder != self._own:
            raise TakenOver(f"run.dir = {self.path.parent} was taken over by {_describe(holder)}; this start ends")

    def _take(self, temporary: Path) -> None:
        try:
            os.link(temporary, self.path)
            return
        except FileExistsError:
            pass
        holder = _read(self.path)
        if not _gone(holder, self._own):
            raise UserError(
                f"run.dir = {self.path.parent} is in use by {_describe(holder)}; "
                f"choose another run.dir, or delete {self.path} if that run is over"
            )
        os.replace(temporary, self.path)

    def release(self) -> None:
        """Give the directory free, unless someone has removed or replaced the lock meanwhile."""
        with contextlib.suppress(OSError, UserError):
            if _read(self.path) == self._own:
                self.path.unlink()
