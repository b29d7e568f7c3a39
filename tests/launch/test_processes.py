"""Children of a launcher end with it, from their first moment on."""

import signal
import subprocess
import sys
import textwrap

import pytest

from megalite import processes
from megalite.processes import Processes
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.processes import is_running

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells of a parent's end"),
]


def test_a_child_whose_parent_is_gone_before_it_begins_does_not_begin(monkeypatch, tmp_path):
    monkeypatch.setattr(processes.os, "getppid", lambda: 1)  # as it is seen between fork and exec
    children = Processes()
    with children.listening():
        child = children.start(["sh", "-c", f"touch {tmp_path}/begun; sleep 60"])
        assert child.wait(PATIENCE_SECONDS) == -signal.SIGTERM
    assert not (tmp_path / "begun").exists()


def test_a_signal_between_fork_and_exec_is_not_forgotten(monkeypatch, tmp_path):
    """The kernel tells of the parent's death at any moment; the child still has the parent's handlers then."""
    end_with_parent = processes.end_with_parent

    def told_at_once(parent):
        end_with_parent(parent)
        processes.os.kill(processes.os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(processes, "end_with_parent", told_at_once)
    children = Processes()
    with children.listening():
        child = children.start(["sh", "-c", f"touch {tmp_path}/begun; sleep 60"])
        assert child.wait(PATIENCE_SECONDS) == -signal.SIGTERM
    assert children.requests == [] and not (tmp_path / "begun").exists()


LAUNCHER = """
import sys
from megalite.processes import Processes

children = Processes()
with children.listening():
    child = children.start(["sleep", "1000"])
    print(child.pid, flush=True)
    child.wait()
"""


def test_a_child_ends_with_a_launcher_that_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True) as launcher:
        child = int(launcher.stdout.readline())
        launcher.kill()
    wait_until(lambda: not is_running(child))


def test_children_ignore_what_their_launcher_ignores():
    """nohup: a closed terminal is nobody's reason to end."""
    code = textwrap.dedent("""
        import signal, subprocess, sys
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        from megalite.processes import Processes
        children = Processes()
        show = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
        with children.listening():
            child = children.start([sys.executable, "-c", show], stdout=subprocess.PIPE)
            print(child.communicate()[0].strip())
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stdout.strip() == "True", done.stderr
