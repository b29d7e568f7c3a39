"""Programs that nobody has read: what they can do is nothing that lasts, and only those that run to their end pass."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megalite.evaluation.sandbox import JAIL, Limits, Verdict, describe, run_program, run_programs
from tests.support.patience import PATIENCE_SECONDS

SHORT = Limits(cpu_seconds=2, seconds=6.0)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is built of what Linux has")


@pytest.fixture(scope="module")
def walls() -> frozenset[str]:
    """What stands on this machine. Without namespaces and Landlock most of what follows cannot hold."""
    verdict = run_program("pass")
    assert verdict.passed, verdict
    assert verdict.walls is not None
    return verdict.walls


def run(program: str, limits: Limits = SHORT) -> Verdict:
    return run_program(textwrap.dedent(program), limits)


def needs(walls: frozenset[str], *any_of: str) -> None:
    if not walls & set(any_of):
        pytest.skip(f"this kernel allows none of {', '.join(any_of)}")


@pytest.mark.fast
def test_right_and_wrong_programs() -> None:
    """A function and its check; a wrong one; one that does not compile; output of any size is lost."""
    right = "def add(a, b):\n    return a + b\n\nprint('x' * 10**6)\nassert add(2, 3) == 5\n"
    programs = [
        right,
        right.replace("a + b", "a - b"),
        "def add(",
        "import nothing_of_that_name",
        "raise SystemExit(0)",
    ]
    verdicts = run_programs(programs)
    assert [verdict.passed for verdict in verdicts] == [True, False, False, False, False]
    assert [verdict.reason.partition(":")[0] for verdict in verdicts] == [
        *("passed", "AssertionError", "SyntaxError", "ModuleNotFoundError", "SystemExit")
    ]


@pytest.mark.fast
@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit()",
        "print('passed', flush=True); import os; os._exit(0)",
        # every descriptor is told that all is well, in the words of the jail
        """
        import json, os
        for descriptor in range(64):
            for word in ("passed", json.dumps({"passed": True, "reason": "passed", "walls": []})):
                try:
                    os.write(descriptor, (word + "\\n").encode())
                except OSError:
                    pass
        os._exit(0)
        """,
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import threading, os; threading.Thread(target=lambda: os._exit(0)).start(); import time; time.sleep(9)",
        "import atexit, os; atexit.register(os._exit, 0); exit(0)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_leaving_early_is_not_passing(program: str) -> None:
    verdict = run(program)
    assert not verdict.passed, verdict


def test_an_endless_loop_and_an_endless_sleep() -> None:
    began = time.monotonic()
    assert not run("while True: pass", Limits(cpu_seconds=1, seconds=20.0)).passed
    assert time.monotonic() - began < 15
    assert run("import time; time.sleep(60)", Limits(seconds=1.0)).reason == "out of time"
    swallowing = """
    import signal
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
    """
    assert not run(swallowing, Limits(cpu_seconds=1, seconds=4.0)).passed


@pytest.mark.fast
def test_four_gigabytes_of_memory() -> None:
    assert run("x = bytearray(4 << 30)").reason == "MemoryError: "
    assert not run("x = []\nwhile True:\n    x.append(bytearray(1 << 26))").passed


def test_a_fork_bomb(walls: frozenset[str]) -> None:
    """It ends with the program, and what it left behind in other sessions does too."""
    needs(walls, "processes", "user")
    mark = f"bomb{secrets.token_hex(5)}"
    bomb = f"""
    import ctypes, os, time
    ctypes.CDLL(None).prctl(15, {mark.encode()!r})
    while True:
        try:
            if os.fork() == 0:
                os.setsid()
        except OSError:
            time.sleep(0.01)
    """
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, bomb, Limits(cpu_seconds=2, seconds=3.0))
        most = 0
        while not running.done():
            most = max(most, len(_named(mark)))
            time.sleep(0.05)
    assert not running.result().passed
    assert 4 < most <= Limits().processes
    assert _named(mark) == []
    assert run("import os\nfor _ in range(64):\n    os.fork()").reason.startswith("BlockingIOError")


def test_a_program_that_passed_leaves_nothing(walls: frozenset[str]) -> None:
    needs(walls, "processes", "user")
    mark = f"left{secrets.token_hex(5)}"
    assert run(LEAVING.format(mark.encode())).passed
    assert _named(mark) == []


LEAVING = """
import ctypes, os, time
ctypes.CDLL(None).prctl(15, {!r})
ready, told = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(told, b"x")
        time.sleep(60)
    os._exit(0)
assert os.read(ready, 1) == b"x"
"""


def _named(name: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                found.append(path.parent.name)
        except OSError:
            pass
    return found


@pytest.mark.fast
def test_no_network(walls: frozenset[str]) -> None:
    """Neither this machine's own ports nor any other address; datagrams neither."""
    needs(walls, "network", "landlock")
    heard: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: heard.append(server.accept()), daemon=True)
        thread.start()
        port = server.getsockname()[1]
        assert run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)").reason != "passed"
    assert heard == []
    if "network" in walls:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.settimeout(0.5)
            send = f"""
            import socket
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sender.sendto(b"x", ("127.0.0.1", {listener.getsockname()[1]}))
            """
            assert not run(send).passed
            with pytest.raises(TimeoutError):
                listener.recv(10)


@pytest.mark.fast
def test_files_outside_the_folder(walls: frozenset[str], tmp_path: Path) -> None:
    """None is made, changed or removed, and none but the system's can be read; in the folder all goes well."""
    needs(walls, "files", "landlock", "user")
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    for action in (
        f"open({str(kept)!r}, 'a').write('more')",
        f"open({str(tmp_path / 'new')!r}, 'w').write('more')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.truncate({str(kept)!r}, 0)",
        f"import os; os.symlink({str(kept)!r}, 'link'); open('link', 'w').write('more')",
        "open('/usr/new', 'w')",
        "open('/etc/passwd', 'a')",
        "import os; os.mkdir('/tmp/of-the-sandbox')",
        "import json; open(json.__file__, 'a')",
    ):
        assert not run(action).passed, action
    assert kept.read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert not Path("/tmp/of-the-sandbox").exists()
    if walls & {"files", "landlock"}:
        assert not run(f"open({str(kept)!r}).read()").passed
    inside = """
    import os, tempfile
    assert os.listdir(".") == []
    with tempfile.TemporaryDirectory() as folder, open(folder + "/file", "w") as file:
        file.write("x" * 1000)
        assert os.path.realpath(folder).startswith(os.getcwd())
    """
    assert run(inside).passed


@pytest.mark.fast
def test_sizes_of_files(walls: frozenset[str]) -> None:
    small = Limits(cpu_seconds=2, seconds=6.0, file=1 << 20, disk=4 << 20)
    assert run("open('large', 'wb').write(bytes(2 << 20))", small).reason.startswith("OSError")
    if "files" in walls:
        many = "for number in range(16):\n    open(str(number), 'wb').write(bytes(1 << 19))"
        assert "No space left" in run(many, small).reason


def test_signals_to_the_parent(walls: frozenset[str]) -> None:
    """This process, the jail, and every other that the program can name live on."""
    needs(walls, "processes", "landlock", "user")
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    program = f"""
    import os, signal
    for number in ({os.getpid()}, {victim.pid}, os.getppid()):
        try:
            os.kill(number, signal.SIGKILL)
        except OSError:
            pass
    try:
        os.kill(-1, signal.SIGKILL)
    except OSError:
        pass
    """
    verdict = run(program)
    assert verdict.reason in ("passed", "ended early")
    assert victim.poll() is None
    victim.communicate(b"\n")


@pytest.mark.fast
def test_nothing_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret of this process")
    known = {"PATH", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HOME", "TMPDIR", "LC_CTYPE"}
    assert run(f"import os; assert set(os.environ) <= {known!r}, os.environ").passed
    assert run("import os; assert not set(map(int, os.listdir('/proc/self/fd'))) & set(range(8, 99))").passed


@pytest.mark.fast
def test_rights_cannot_be_got_back(walls: frozenset[str]) -> None:
    """No capability is left, and no new namespace can be made in which a mount would be allowed."""
    needs(walls, "files")
    again = """
    import ctypes
    libc = ctypes.CDLL(None)
    assert "CapEff:\\t0000000000000000" in open("/proc/self/status").read()
    assert libc.unshare(0x10000000) != 0
    assert libc.mount(b"tmpfs", b"/usr", b"tmpfs", 0, None) != 0
    assert libc.setuid(0) != 0
    """
    assert run(again).passed, run(again)


def _interpreter() -> str:
    """One whose own files every user can read: without namespaces the jail runs as another user."""
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            where = subprocess.check_output([python, "-I", "-c", "import json; print(json.__file__)"], text=True)
            path = Path(where.strip())
            if os.geteuid() or all(part.stat().st_mode & 0o005 for part in (path, *path.parents)):
                return python
    pytest.skip("only this user can read the interpreter's own files, and another user is to run it")


def _without_namespaces(program: str, folder: Path) -> dict[str, Any]:
    """The jail as a kernel runs it that allows no namespaces."""
    code = f"import sys; sys.path.insert(0, {str(JAIL.parent)!r}); import jail; jail.separate = set; jail.main()"
    limits = {"cpu": 2, "memory": 1 << 30, "file": 1 << 24, "disk": 1 << 26, "processes": 16}
    job = {"program": textwrap.dedent(program), "folder": str(folder), "seconds": 6.0, "limits": limits}
    command = [_interpreter(), "-I", "-B", "-c", code]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    return json.loads(done.stdout)


def test_a_kernel_without_namespaces() -> None:
    """What is left is told, and holds: orphans end with the program, limits and the secret stand."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        found = _without_namespaces("assert 1 + 1 == 2; open('x', 'w').close()", folder)
        assert found["passed"], found
        assert not set(found["walls"]) & {"network", "files", "processes"}
        assert not _without_namespaces("import os; os._exit(0)", folder)["passed"]
        assert not _without_namespaces("x = bytearray(4 << 30)", folder)["passed"]
        mark = f"left{secrets.token_hex(5)}"
        assert _without_namespaces(LEAVING.format(mark.encode()), folder)["passed"]
        assert _named(mark) == []
        if "landlock" in found["walls"]:
            assert not _without_namespaces("open('/var/tmp/new', 'w')", folder)["passed"]


@pytest.mark.fast
def test_what_is_told_about_the_walls() -> None:
    assert "no network;" in describe(frozenset({"network", "files"}))
    assert "no TCP" in describe(frozenset({"landlock"}))
    assert "NETWORK IS OPEN" in describe(frozenset({"user"}))
    assert "NOT protected" in describe(frozenset())
    assert "cannot be set up" in describe(None)
