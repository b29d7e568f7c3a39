"""A private SLURM cluster on this machine, from the distribution's own daemons; its directory holds all of it.

As root every node gets a network namespace with a name and an address of its own (10.78.x), so that nodes find each
other as on a real cluster and a cable can be pulled. Otherwise the nodes share the machine's loopback address.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.support.patience import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
CORES = 16  # that each node claims to have

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=5
KillWait=5
MessageTimeout=10
TCPTimeout=2
TreeWidth=65533
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
"""
_PARTITIONS = """
PartitionName=low Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    return f"{', '.join(absent)} not installed (Debian and Ubuntu: apt install slurm-wlm munge)" if absent else ""


def until(condition: Callable[[], object], what: str) -> None:
    """Poll until `condition` holds."""
    wait_until(condition, told=lambda: what, interval=0.2)


_FIT = ("idle", "mixed", "allocated", "completing")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _quiet(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


class Network:
    """One namespace for each node on a bridge; made by `open`: None where this machine does not allow it."""

    def __init__(self, number: int, nodes: Sequence[str]) -> None:
        self.prefix, self.subnet, self.nodes = f"mls{number}", f"10.78.{number}", nodes
        self.controller = f"{self.subnet}.254"

    @classmethod
    def open(cls, nodes: Sequence[str]) -> Network | None:
        if os.geteuid() != 0 or shutil.which("ip", path=SEARCH) is None:
            return None
        for number in random.sample(range(1, 250), 5):  # another cluster may have the first
            network = cls(number, nodes)
            if _quiet("ip", "link", "add", f"{network.prefix}b", "type", "bridge"):
                if network._build():
                    return network
                network.close()
        return None

    def _build(self) -> bool:
        bridge = f"{self.prefix}b"
        steps = [f"ip addr add {self.controller}/24 dev {bridge}", f"ip link set {bridge} up"]
        for index in range(len(self.nodes)):
            space = f"{self.prefix}n{index}"
            steps += [
                f"ip netns add {space}",
                f"ip link add {space}v type veth peer name eth0 netns {space}",
                f"ip link set {space}v master {bridge} up",
                f"ip -n {space} addr add {self.subnet}.{index + 1}/24 dev eth0",
                f"ip -n {space} link set eth0 up",
                f"ip -n {space} link set lo up",
            ]
        probe = f"nsenter --net=/run/netns/{self.prefix}n0 unshare --uts --mount true"
        return all(_quiet(*step.split()) for step in [*steps, probe])

    def address(self, node: str) -> str:
        return f"{self.subnet}.{self.nodes.index(node) + 1}"

    def enter(self, node: str, hosts: Path) -> list[str]:
        """The words before a command that is to run on this node."""
        inside = f'mount --bind {hosts} /etc/hosts && hostname {node} && exec "$@"'
        space = f"/run/netns/{self.prefix}n{self.nodes.index(node)}"
        return ["nsenter", f"--net={space}", "unshare", "--uts", "--mount", "sh", "-c", inside, "sh"]

    def plug(self, node: str, up: bool) -> None:
        """Pull a node's cable, or put it back."""
        space = f"{self.prefix}n{self.nodes.index(node)}"
        assert _quiet("ip", "-n", space, "link", "set", "eth0", "up" if up else "down")

    def close(self) -> None:
        for index in range(len(self.nodes)):
            _quiet("ip", "netns", "del", f"{self.prefix}n{index}")
            _quiet("ip", "link", "del", f"{self.prefix}n{index}v")
        _quiet("ip", "link", "del", f"{self.prefix}b")


class Cluster:
    """Started by construction; `close` leaves no process and no interface behind."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"n{index}" for index in range(nodes)]
        self.configuration = folder / "slurm.conf"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(self.configuration),
            "PATH": SEARCH,
        }
        self.network = Network.open(self.nodes)
        try:
            self._configure()
            self._start()
        except BaseException:
            self.close()
            raise

    # Daemons

    def _configure(self) -> None:
        for name in ("run", "state", "log", "munge"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        (self.folder / "run").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(self.nodes))
        controller = self.network.controller if self.network else "127.0.0.1"
        text = _CONFIGURATION.format(
            host=host, controller=controller, port=ports[0], user=_user(), folder=self.folder
        ).lstrip()
        for node, port in zip(self.nodes, ports[1:]):
            where = f"NodeHostname={host} NodeAddr=127.0.0.1"
            if self.network:
                where = f"NodeHostname={node} NodeAddr={self.network.address(node)}"
            text += f"NodeName={node} {where} Port={port} CPUs={CORES} RealMemory=4000 Gres=gpu:2 State=UNKNOWN\n"
        self.configuration.write_text(text + _PARTITIONS.lstrip())
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        for index in range(2):
            (self.folder / f"gpu{index}").touch()
        names = ["127.0.0.1 localhost", f"{controller} {host}"]
        names += [f"{self.network.address(node)} {node}" for node in self.nodes] if self.network else []
        self.hosts = self.folder / "hosts"
        self.hosts.write_text("\n".join(names) + "\n")

    def _daemon(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    def _start(self) -> None:
        run, munge = self.folder / "run", self.folder / "munge"
        files = {"key-file": munge / "key", "socket": run / "munge.sock", "pid-file": run / "munged.pid"}
        files |= {"log-file": munge / "log", "seed-file": munge / "seed"}
        self._daemon("munged", "--force", "--num-threads=2", *(f"--{name}={path}" for name, path in files.items()))
        self._daemon("slurmctld", "-c")
        for node in self.nodes:
            self.start_node(node)
        until(lambda: len(self.idle()) == len(self.nodes), "all nodes are idle")

    def start_node(self, node: str) -> None:
        enter = self.network.enter(node, self.hosts) if self.network else []
        self._daemon(*enter, "slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """As when the power goes: the daemon and everything that it started, at once."""
        daemon = int((self.folder / "run" / f"slurmd-{node}.pid").read_text())
        os.kill(daemon, signal.SIGKILL)
        for process, variables in self.processes():
            if f"SLURMD_NODENAME={node}" in variables or _is_stepd(process, node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """(process id, environment) of everything that runs under this cluster's configuration, on all nodes."""
        mark = f"SLURM_CONF={self.configuration}"
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                variables = path.read_bytes().decode(errors="replace").split("\0")
                if mark in variables and int(path.parent.name) != os.getpid():
                    yield int(path.parent.name), variables

    def close(self) -> None:
        if self.configuration.exists() and _running(self.folder / "run" / "slurmctld.pid"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.command("scancel", "--full", "--signal=KILL", f"--user={_user()}", check=False)
        for path in sorted((self.folder / "run").glob("*.pid"), key=lambda path: path.name != "slurmctld.pid"):
            _end(path)
        deadline = time.monotonic() + 10
        while (left := [process for process, _ in self.processes()]) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)
        if self.network:
            self.network.close()

    # Jobs

    def command(self, *words: str, check: bool = True, timeout: float = 30) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def heal(self) -> None:
        """Make all nodes fit for jobs again, whatever the last test did to them."""

        def fit() -> bool:
            states = self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").split()
            sick = [node for node, state in zip(states[::2], states[1::2]) if state not in _FIT]
            for node in sick:  # a node that met a job of its past is drained until somebody says otherwise
                self.command("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            return not sick

        until(fit, "all nodes are fit")

    def idle(self) -> set[str]:
        return set(self.command("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split())

    def show(self, job: str, field: str) -> str:
        """A field of `scontrol show job`; empty where the job or the field is unknown."""
        match = re.search(rf"(?:^| ){field}=(\S*)", self.command("scontrol", "show", "job", "-o", job, check=False))
        return match[1] if match else ""

    def wait(self, job: str) -> tuple[str, str]:
        """(state, exit code as SLURM writes it, `code:signal`) of a job that has ended for good."""
        done = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")
        until(lambda: self.show(job, "JobState") in done, f"job {job} ends (now {self.show(job, 'JobState')})")
        return self.show(job, "JobState"), self.show(job, "ExitCode")


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


def _is_stepd(process: int, node: str) -> bool:
    """slurmstepd's environment does not name the node; its command line may."""
    try:
        return f"-N {node}" in Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return False


def _running(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def _end(pid_file: Path) -> None:
    """Ask the daemon to end, and make it."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0)):
        deadline = time.monotonic() + patience
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid_file.read_text()), number)
        while _running(pid_file) and time.monotonic() < deadline:
            time.sleep(0.05)
