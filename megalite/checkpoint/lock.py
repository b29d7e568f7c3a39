"""One job per run directory: the lock file `run.lock` names host, process and job of the run that writes there.

The file is created atomically with its full content (a hard link to a finished temporary file). A lock is taken over
only when its holder is known to be gone:

- the holder was an earlier start or step of the same SLURM job, or a job that SLURM reports as ended
  (`MEGALITE_ENDED_JOB`);
- its process is dead, checked under the same kernel (boot id) and in the same pid namespace, where pids are comparable;
- it ran in another pid namespace of the same kernel, and the kernel's lock (flock) on the file is free again;
- this host has been rebooted since, and neither the holder nor this process runs in a container.

In every other case the start is refused: host names, clocks and file times of two machines prove nothing.

A job that SLURM reports as ended may still be running behind a network partition. So the lock is also a fence: its
holder checks it again before it changes checkpoints, and ends if it was taken over; `token` keeps the unfinished files
of two holders apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any, BinaryIO

from megalite.errors import UserError
from megalite.files import locked, read_bounded

LOCK = "run.lock"
ENDED_JOB_ENVIRONMENT = "MEGALITE_ENDED_JOB"
"""Environment variable: the SLURM job that holds the lock, if SLURM reports it as ended."""

_MAX_BYTES = 1 << 16
_MAX_PID = 1 << 31
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""The pid namespace outside of containers; the number is fixed in the kernel (PROC_PID_INIT_INO)."""
_FIELDS = {"host": str, "pid": int, "started": str, "job_id": str, "restart_count": str, "step_id": str}
_LATER_FIELDS = {"boot": str, "machine": str, "pid_namespace": str, "flock": bool}
"""Fields that locks of older versions lack."""


class TakenOver(RuntimeError):
    """A later start has taken over the run directory: this process must no longer write there."""


def _system(path: str) -> str:
    """The content of a small system file; empty if it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """A process's start time in kernel ticks since boot; empty if it is not running or cannot be read."""
    fields = _system(f"/proc/{pid}/stat").rpartition(")")[2].split()
    # A zombie holds no files and no longer writes.
    return "" if not fields or fields[0] in "ZX" else fields[19]


def _identity() -> dict[str, Any]:
    job = {name: os.environ.get(f"SLURM_{name.upper()}", "") for name in ("job_id", "restart_count", "step_id")}
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _process_start(pid),
        **job,
        "boot": _system("/proc/sys/kernel/random/boot_id"),
        "machine": _system("/etc/machine-id"),
        "pid_namespace": _pid_namespace(),
        "flock": False,
    }


def _alive(pid: int, started: str) -> bool:
    """Whether the process that wrote the lock still runs here; another process with the same pid does not count."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _process_start(pid)
    return (now == started) if started and os.path.exists("/proc/self/stat") else True


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 18 else 0


def _gone(holder: dict[str, Any], own: dict[str, Any], path: Path) -> bool:
    if own["job_id"] and holder["job_id"] == own["job_id"]:
        then, now = ((_number(one["restart_count"]), _number(one["step_id"])) for one in (holder, own))
        if now != then:
            return now > then
    elif holder["job_id"] and holder["job_id"] == os.environ.get(ENDED_JOB_ENVIRONMENT):
        return True
    if holder["host"] != own["host"]:
        return False
    if holder["boot"] != own["boot"]:
        namespaces = {holder["pid_namespace"], own["pid_namespace"]}
        same_machine = bool(own["machine"]) and holder["machine"] == own["machine"]
        return same_machine and namespaces == {_INITIAL_PID_NAMESPACE}
    if holder["pid_namespace"] != own["pid_namespace"]:
        return holder["flock"] and _is_free(path)
    return not _alive(holder["pid"], holder["started"])


def _is_free(path: Path) -> bool:
    """Whether no process holds the kernel's lock on the file; False if unknown."""
    try:
        with locked(path) as held:
            return held
    except OSError:
        return False


def _describe(holder: dict[str, Any]) -> str:
    job = f", job {holder['job_id']} restart {_number(holder['restart_count'])}" if holder["job_id"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}"


def _read(path: Path, own: dict[str, Any]) -> dict[str, Any]:
    """The holder named by a lock; fields that older versions did not write are assumed equal to ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        holder = json.loads(read_bounded(path, _MAX_BYTES))
        if isinstance(holder, dict):
            holder = {name: own[name] for name in _LATER_FIELDS} | {"flock": False} | holder
            fields = _FIELDS | _LATER_FIELDS
            if all(type(holder.get(name)) is kind for name, kind in fields.items()) and 0 < holder["pid"] < _MAX_PID:
                return holder
    raise UserError(f"{path} is not readable as a lock; if no run uses {path.parent}, delete it")


class RunLock:
    """Held from construction until `release`; raises `UserError` if another run holds the directory."""

    def __init__(self, run_dir: Path | str) -> None:
        self.path = Path(run_dir) / LOCK
        self._own = _identity()
        self.token = f"{self._own['host']}-{self._own['pid']}-{secrets.token_hex(4)}"
        """A unique word for file names; two containers can share host name and pid."""
        self._file: BinaryIO | None = None
        try:
            self._made = not self.path.parent.is_dir()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            raise UserError(f"run.dir = {str(run_dir)!r} cannot be used: {error}") from None

    def _acquire(self) -> None:
        temporary = self.path.with_name(f"{LOCK}.{self.token}")
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # file systems without flock: the link below still decides
                # Serialises two runs that start at once on one host and find a stale lock.
                stack.enter_context(locked(self.path.parent, wait=True))
            # Kept open: the kernel's lock on it shows other namespaces that we are alive.
            file = open(temporary, "xb")  # noqa: SIM115
            try:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._own["flock"] = True
                file.write(json.dumps(self._own).encode() + b"\n")
                file.flush()
                self._take(temporary)
                self._file = file
            finally:
                temporary.unlink(missing_ok=True)
                if self._file is not file:
                    file.close()

    def verify(self) -> None:
        """Raise `TakenOver` if another run now holds the directory; recreates a lock that was deleted."""
        if not self.path.exists():
            self._acquire()
        holder = _read(self.path, self._own)
        if holder != self._own:
            raise TakenOver(f"run.dir = {self.path.parent} was taken over by {_describe(holder)}; this start ends")

    def _take(self, temporary: Path) -> None:
        try:
            os.link(temporary, self.path)
            return
        except FileExistsError:
            pass
        holder = _read(self.path, self._own)
        if not _gone(holder, self._own, self.path):
            raise UserError(
                f"run.dir = {self.path.parent} is in use by {_describe(holder)}; "
                f"choose another run.dir, or delete {self.path} if that run is over"
            )
        os.replace(temporary, self.path)

    def release(self) -> None:
        """Release the directory, unless the lock was removed or replaced meanwhile. Idempotent.

        A directory created only for the lock is removed too.
        """
        with contextlib.suppress(OSError, UserError):
            if _read(self.path, self._own) == self._own:
                self.path.unlink()
                if self._made:
                    self.path.parent.rmdir()
        if self._file is not None:
            self._file.close()
            self._file = None
