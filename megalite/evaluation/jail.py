"""The program in which an untrusted program runs: `python -I -B jail.py`, started by `sandbox.py`, importing nothing of
megalite. It reads a job as JSON from standard input and writes a verdict as JSON to standard output.

This process, the *warden*, never runs untrusted code. It forks the *inmate*, which gives up everything it can give up
and then runs the program. A program has passed if the inmate says so with the secret that both got before the fork: a
program that ends early, or prints what it likes, has not. (One that is written to search the memory of its own
interpreter for that secret could find it; the rest of the walls stand for it too.)

Each wall is put up where the kernel allows, and the verdict names those that stand:

    network     a network namespace without interfaces
    files       a root of its own: the interpreter and system libraries, read-only, and an empty folder in memory
    landlock    Landlock: no file outside these, no TCP, no signal to processes outside
    processes   a process namespace, which ends as a whole
    user        a user of its own, where the caller is root
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import select
import signal
import struct
import sys
import time
from contextlib import suppress
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY, ATTR_NOSUID = 442, -100, 0x8000, 0x1, 0x2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 4, 38, 36
CAPABILITY_VERSION = 0x20080522

READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
NOBODY = 65534
OWN_USERS = 1 << 30
"""Numbers from which users are drawn that no system gives away, so that no other process counts as the inmate's."""

READ, WRITE = 0b1101, 0b0111_1111_1111_0010
"""Rights of Landlock to files: execute, read, list; and everything that changes some (of its third version)."""

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = (source.encode(), target.encode(), kind.encode() if kind else None)
    check(libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None), f"mount {target}")


# Walls


def separate() -> set[str]:
    """New namespaces for this process (network) and its children (processes). As root without a user namespace, as
    anyone else with one in which this user is alone."""
    flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    if os.geteuid() == 0 and libc.unshare(flags) == 0:
        return {"network", "processes"}
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(flags | NEWUSER) < 0:
        return set()
    for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    return {"network", "processes"}


def readable_paths() -> list[str]:
    """What a program may read: system libraries, and where this interpreter finds its own."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *filter(None, sys.path)}
    own = {os.path.realpath(path) for path in own} | own
    paths = [path for path in [*READABLE, *sorted(own)] if os.path.exists(path) and path != "/"]
    inside = [path for path in paths if any(path.startswith(other + "/") for other in paths if other != path)]
    return [path for path in dict.fromkeys(paths) if path not in inside]


def private_root(folder: str, size: int) -> None:
    """Make `folder` the root: what is readable, devices, and the folder itself, all but the last read-only."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=755")
    for path in (*readable_paths(), *DEVICES):
        target = folder + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "w").close()
        mount(path, target, None, MS_BIND | MS_REC)
    os.makedirs(folder + "/proc")
    with suppress(OSError):  # not in every container
        mount("proc", folder + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.makedirs(folder + "/sandbox")
    mount("tmpfs", folder + "/sandbox", "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=777")
    attributes = struct.pack("QQQQ", ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    call = (MOUNT_SETATTR, AT_FDCWD, folder.encode(), AT_RECURSIVE, attributes, len(attributes))
    check(libc.syscall(*call), "mount_setattr")
    attributes = struct.pack("QQQQ", ATTR_NOSUID, ATTR_RDONLY, 0, 0)
    call = (MOUNT_SETATTR, AT_FDCWD, (folder + "/sandbox").encode(), 0, attributes, len(attributes))
    check(libc.syscall(*call), "mount_setattr")
    os.chroot(folder)


def landlock(folder: str, readable: list[str]) -> bool:
    """Restrict this process for good; False where the kernel has no Landlock."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    files = READ | WRITE
    files &= ~((1 << 13) * (version < 2) | (1 << 14) * (version < 3))
    network, scopes = (0b11 if version >= 4 else 0), (0b11 if version >= 6 else 0)
    attributes = struct.pack("QQQ", files, network, scopes)[: 8 * (1 + (version >= 4) + (version >= 6))]
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    rules = [(path, READ) for path in (*readable, "/proc")] + [(folder, files)]
    rules += [(device, 0b110) for device in DEVICES]
    for path, rights in rules:
        if not os.path.exists(path):
            continue
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= 0b100_0000_0000_0111  # those that a file can have
        rule = struct.pack("=Qi", rights & files, descriptor)
        check(libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock rule {path}")
        os.close(descriptor)
    check(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock")
    os.close(ruleset)
    return True


def change_user(folder: str) -> bool:
    """Root becomes a user of its own, to whom the folder then belongs; False where that is not possible."""
    if os.geteuid() != 0:
        return False
    for user in (OWN_USERS + secrets.randbelow(OWN_USERS), NOBODY):
        with suppress(OSError):
            os.chown(folder, user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return True
    return False


def can_still_import() -> bool:
    with suppress(OSError), open(json.__file__, "rb"):
        return True
    return False


def give_up_rights() -> None:
    """No capability in any namespace, and no way to get one."""
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    header, nothing = struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)
    check(libc.capset(header, nothing), "capset")


def set_limits(limits: dict[str, int], own_count: bool) -> None:
    """CPU seconds, bytes of memory and of a file, open files, and processes.

    Processes are counted for a user; where that one has others too, they are added to the limit.
    """
    names = {"cpu": resource.RLIMIT_CPU, "memory": resource.RLIMIT_AS, "file": resource.RLIMIT_FSIZE}
    for name, kind in names.items():
        resource.setrlimit(kind, (limits[name], limits[name]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    processes = limits["processes"] + (0 if own_count else threads_of(os.geteuid()))
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))


def threads_of(user: int) -> int:
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


# The inmate


def inmate(job: dict[str, Any], walls: set[str], say: int, secret: str) -> None:
    """Put up the walls, say which stand, run the program, and say with the secret how it ended."""
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    os.setsid()
    if "processes" in walls and (child := os.fork()):
        os.waitpid(child, 0)  # the first process of a namespace: limits do not kill it, and its end kills the others
        return
    try:
        put_up_walls(job, walls)
    except OSError as error:
        os.write(say, json.dumps({"failure": str(error)}).encode() + b"\n")
        return
    os.write(say, json.dumps({"walls": sorted(walls)}).encode() + b"\n")
    os.write(say, f"{secret} {run(job['program'])}\n".encode())


def put_up_walls(job: dict[str, Any], walls: set[str]) -> None:
    """All walls that this kernel allows, into `walls`; raises OSError where not even the limits can be set."""
    folder = job["folder"]
    own_count = "processes" in walls and os.geteuid() != 0
    if "processes" in walls:
        with suppress(OSError):
            private_root(folder, job["limits"]["disk"])
            folder = "/sandbox"
            walls.add("files")
    if change_user(folder):
        walls.add("user")
        own_count = True
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # which a change of the user takes back
    if not can_still_import():
        raise OSError(f"{os.geteuid()} cannot read the interpreter's own files")
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    set_limits(job["limits"], own_count)
    give_up_rights()
    with suppress(OSError):
        if landlock(folder, readable_paths()):
            walls.add("landlock")


def run(program: str) -> str:
    """`passed`, or what the program raised."""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
    return "passed"


# The warden


def watch(child: int, listen: int, job: dict[str, Any], secret: str) -> dict[str, Any]:
    """Wait for the inmate's last word, for at most the job's seconds; the verdict."""
    deadline, heard = time.monotonic() + job["seconds"], b""
    while (left := deadline - time.monotonic()) > 0 and len(heard) < 1 << 16:
        if not select.select([listen], [], [], left)[0]:
            break
        piece = os.read(listen, 4096)
        heard += piece
        if not piece or heard.count(b"\n") >= 2:
            break
    late = deadline <= time.monotonic()
    end_all(child)
    lines = heard.decode(errors="replace").splitlines()
    found = json.loads(lines[0]) if lines else {"failure": "out of time" if late else "it ended"}
    if "failure" in found:
        return {"passed": False, "reason": f"the sandbox could not be set up: {found['failure']}", "walls": None}
    if len(lines) > 1 and lines[1].startswith(secret + " "):
        outcome = lines[1].removeprefix(secret + " ")
        return {"passed": outcome == "passed", "reason": outcome, "walls": found["walls"]}
    return {"passed": False, "reason": "out of time" if late else "ended early", "walls": found["walls"]}


def end_all(child: int) -> None:
    """Kill the inmate and whatever it started: what has left its group comes to this process, the reaper of its
    descendants."""
    for kill in (os.kill, os.killpg):
        with suppress(OSError):
            kill(child, signal.SIGKILL)
    while True:
        for orphan in children():
            with suppress(OSError):
                os.kill(orphan, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    with suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]
    return []


def main() -> None:
    job = json.load(sys.stdin)
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, this ends first
    secret = secrets.token_hex(16)
    walls = separate()
    listen, say = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(listen)
        try:
            inmate(job, walls, say, secret)
        finally:
            os._exit(0)
    os.close(say)
    print(json.dumps(watch(child, listen, job, secret)), flush=True)


if __name__ == "__main__":
    main()
