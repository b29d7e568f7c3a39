"""tools/doctor.py: a machine alone, GPUs by a pretended nvidia-smi, and nodes compared; preflights of two processes."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalite.doctor.findings import FAULT, OK, WARNING, Finding, rows
from megalite.doctor.gpus import look_at_gpus
from megalite.doctor.machine import look_at_disk
from megalite.doctor.preflight import compare, compare_rates
from tests.support.tiny import write_recipe
from tools.doctor import main

TOOL = Path(__file__).parents[2] / "tools" / "doctor.py"

HEALTHY = {
    "name": "NVIDIA H100 80GB HBM3", "driver_version": "550.54.15", "temperature.gpu": "34", "clocks.sm": "345",
    "clocks.max.sm": "1980", "memory.used": "4", "memory.total": "81559", "power.draw": "71",
    "power.limit": "700.00",
    "pcie.link.width.current": "16", "pcie.link.width.max": "16", "ecc.mode.current": "Enabled",
    "ecc.errors.uncorrected.volatile.total": "0", "retired_pages.pending": "[N/A]", "mig.mode.current": "Disabled",
    "clocks_throttle_reasons.active": "0x0000000000000001",
}  # fmt: skip

PRETENDED = """#!{python}
import sys, time
gpus, known = {gpus!r}, {known!r}
if {hangs}:
    time.sleep(100)
query = next(word for word in sys.argv if word.startswith("--query-gpu="))
fields = query.partition("=")[2].split(",")
for field in fields:
    if field not in known:
        print(f'Field "{{field}}" is not a valid field to query.')
        sys.exit(2)
for index, gpu in enumerate(gpus):
    print(", ".join(str(index) if field == "index" else gpu[field] for field in fields))
"""


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Put an nvidia-smi on the path that tells of these GPUs and, as the real one, refuses unknown fields."""

    def make(*changes, missing=(), hangs=False):
        gpus = [HEALTHY | change for change in changes]
        known = ["index", *(field for field in HEALTHY if field not in missing)]
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(PRETENDED.format(python=sys.executable, gpus=gpus, known=known, hangs=hangs))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return make


def wrong(findings):
    return [finding for finding in findings if finding.level != OK]


@pytest.mark.fast
def test_healthy_gpus(pretend):
    pretend({}, {})
    findings, common = look_at_gpus("node1", expected=2)
    assert not wrong(findings) and common == {"GPU": HEALTHY["name"], "driver": "550.54.15"}
    assert str(findings[0]) == "ok       node1           GPUs: 2 x NVIDIA H100 80GB HBM3"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"ecc.errors.uncorrected.volatile.total": "3"}, FAULT, "3 uncorrected"),
        ({"retired_pages.pending": "Yes"}, FAULT, "retirement"),
        ({"clocks_throttle_reasons.active": "0x0000000000000048"}, FAULT, "345 of 1980 MHz by hardware slowdown, heat"),
        ({"clocks_throttle_reasons.active": "0x80"}, FAULT, "power brake"),
        ({"clocks_throttle_reasons.active": "0x0000000000000004"}, OK, ""),  # the power cap is usual under load
        ({"ecc.mode.current": "Disabled"}, WARNING, "off"),
        ({"mig.mode.current": "Enabled"}, WARNING, "MIG"),
        ({"temperature.gpu": "91"}, WARNING, "91 C"),
        ({"memory.used": "30720"}, WARNING, "30.0 of 80 GiB in use"),
        ({"pcie.link.width.current": "8"}, WARNING, "x8 of x16"),
        ({"name": "NVIDIA A100"}, WARNING, "slowest kind"),
        ({"ecc.mode.current": "[N/A]", "power.draw": "[Not Supported]"}, OK, ""),
    ],
)
def test_a_sick_gpu_is_named(pretend, change, level, words):
    pretend({}, change)
    found = wrong(look_at_gpus("node1")[0])
    if level == OK:
        assert not found
        return
    assert [finding.level for finding in found] == [level] and words in str(found[0])
    assert found[0].where == ("node1" if "name" in change else "node1 gpu 1") and found[0].remedy


@pytest.mark.fast
def test_gpus_that_are_missing_or_do_not_answer(pretend, monkeypatch):
    pretend({})
    found = wrong(look_at_gpus("node1", expected=2)[0])
    assert [finding.value for finding in found] == ["1 x NVIDIA H100 80GB HBM3, 2 expected"]
    pretend({}, missing=("ecc.mode.current", "clocks_throttle_reasons.active", "retired_pages.pending"))
    assert not wrong(look_at_gpus("node1")[0]), "older drivers know fewer fields"
    pretend({}, missing=("clocks.sm",))
    assert "not a valid field" in wrong(look_at_gpus("node1")[0])[0].value
    monkeypatch.setattr("megalite.doctor.gpus._TIMEOUT_SECONDS", 0.5)
    pretend({}, hangs=True)
    found = wrong(look_at_gpus("node1")[0])
    assert found[0].level == FAULT and "no answer" in found[0].value


@pytest.mark.fast
def test_slow_devices_are_named_among_their_kind():
    even = {f"node{number} gpu 0 (rank {number})": 700.0 + number for number in range(6)}
    assert compare_rates(even) == []
    found = compare_rates(even | {"node9 gpu 3 (rank 6)": 500.0, "node9 cpu (rank 7)": 0.1})
    assert [finding.where for finding in found] == ["node9 gpu 3 (rank 6)"] and "71% of the median" in found[0].value
    busy = compare_rates({"node0 cpu (rank 0)": 1.0, "node1 cpu (rank 1)": 0.1})
    assert [finding.level for finding in busy] == [WARNING], "whatever else runs there at the moment"


def node(host, rank=0, **more):
    plain = {
        "host": host, "versions": {"torch": "2.13.0", "NCCL": "2.27"}, "data": {"corpus": "abc"}, "time": 1e9,
        "rates": {"gpu 0": 700.0}, "links": {}, "cores": list(range(8)),
        "findings": rows([Finding(OK, "disk", host, "fine")]),
    }  # fmt: skip
    return plain | more


@pytest.mark.fast
def test_nodes_that_differ_are_named():
    reports = {rank: node(f"node{rank}") for rank in range(4)}
    assert not wrong(compare(reports))
    reports[2] = node("node2", versions={"torch": "2.13.0", "NCCL": "2.21"}, data={"corpus": "abd"}, time=1e9 - 60)
    found = wrong(compare(reports))
    assert [finding.where for finding in found] == ["node2", "node2", "rank 2 (node2)"]
    assert "NCCL 2.21, elsewhere 2.27" in found[0].value and "corpus" in found[1].value and "-60 s" in found[2].value


@pytest.mark.fast
def test_a_node_with_too_few_cores_is_named():
    """One core for each rank, its own or shared, is what SLURM gives to whom does not ask."""
    own = {rank: node("node0", rates={f"gpu {rank}": 700.0}, cores=[rank]) for rank in range(4)}
    shared = {rank + 4: node("node1", rates={f"gpu {rank}": 700.0}, cores=[0, 1, 2, 3]) for rank in range(4)}
    enough = {rank + 8: node("node2", rates={f"gpu {rank}": 700.0}, cores=list(range(16))) for rank in range(4)}
    found = wrong(compare(own | shared | enough))
    assert [(finding.level, finding.where) for finding in found] == [(FAULT, "node0"), (FAULT, "node1")]
    assert "4 cores for 4 GPUs" in found[0].value and "--cpus-per-task" in found[0].remedy


@pytest.mark.fast
def test_a_slow_link_is_named_by_its_group():
    reports = {}
    for rank in range(8):
        peers = [rank - rank % 2, rank - rank % 2 + 1]
        speed = 20.0 if 5 in peers else 80.0
        reports[rank] = node(f"node{rank}", links={"tp": {"ranks": peers, "gigabytes_per_second": speed}})
    found = wrong(compare(reports))
    assert [finding.where for finding in found] == ["ranks 4, 5 (node4, node5)"] and "25% of the median" in found[
        0
    ].value


@pytest.mark.fast
def test_a_disk_that_is_too_small_or_closed(tmp_path, monkeypatch):
    assert not wrong(look_at_disk("node1", tmp_path / "not" / "yet"))
    found = wrong(look_at_disk("node1", tmp_path, needed=1 << 60))
    assert found[0].level == FAULT and "checkpoint.keep" in found[0].remedy
    found = wrong(look_at_disk("node1", Path("/proc/self")))
    assert any("cannot be written" in finding.value for finding in found)


def test_alone_on_this_machine(tmp_path):
    done = subprocess.run([sys.executable, TOOL, "--json", "--run-dir", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["healthy"] is True
    checks = {finding["check"] for finding in told["findings"]}
    assert {"versions", "compiler", "C++ extension", "disk", "GPUs", "matmul", "machine"} <= checks
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "'--quick' is not understood"),
        (["--time-limit", "0"], "--time-limit: '0' is not a time"),
        (["--time-limit", "soon"], "--time-limit: 'soon' is not a time"),
        (["--time-limit", "1e400"], "--time-limit: '1e400' is not a time"),
        (["--run-dir"], "--run-dir: expected one argument"),
        (["--preflight", "nowhere.toml"], "nowhere.toml"),
        (["--preflight", "RECIPE", "--model.layrs", "2"], "did you mean model.layers"),
    ],
)
def test_unusable_arguments_are_one_line(recipe, monkeypatch, capsys, arguments, message):
    arguments = [str(recipe) if word == "RECIPE" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert message in said.err and len(said.err.strip().splitlines()) == 1


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, parallel={"tensor": 2})


@contextlib.contextmanager
def processes(recipe, ranks, *arguments, size=2, scheduler="torchrun"):
    """`ranks` of a job of `size`, each a process of this test, with torchrun's or SLURM's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    }
    started = []
    for rank in ranks:
        place = dict(zip(names[scheduler], (str(rank), str(size), str(rank))))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(TOOL), "--preflight", str(recipe), *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=os.environ | place | meeting, **streams))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("scheduler", ["torchrun", "slurm"])
def test_a_healthy_job(recipe, scheduler):
    with processes(recipe, (0, 1), scheduler=scheduler) as (first, second):
        output, errors = first.communicate(timeout=400)
        quiet = second.communicate(timeout=400)[0]
        assert (first.returncode, second.returncode) == (0, 0), output + errors
    assert "tp: sums correct" in output and "healthy" in output and "data: " in output
    assert not quiet, "rank 0 speaks for all"
    assert not list((recipe.parent / "run").iterdir()), "the token is gone"


def test_data_that_is_missing_or_broken_is_a_fault(recipe):
    body = recipe.parent / "tokens.bin"
    body.write_bytes(body.read_bytes()[:-10])
    with processes(recipe, (0, 1)) as started:
        output = started[0].communicate(timeout=400)[0]
        started[1].communicate(timeout=400)
        assert [process.returncode for process in started] == [1, 1]
    faults = [line for line in output.splitlines() if line.startswith("fault")]
    assert len(faults) == 1 and "tokens" in faults[0] and "data: " in faults[0]


def test_a_rank_that_does_not_come_is_named(recipe):
    with processes(recipe, (0, 3), "--time-limit", "60", size=4) as started:
        output = started[0].communicate(timeout=400)[0]
        started[1].communicate(timeout=400)
        assert [process.returncode for process in started] == [1, 1]
    assert "ranks 1, 2 " in output and "did not come" in output


def test_a_rank_that_hangs_is_named(recipe):
    with processes(recipe, (0, 1), "--time-limit", "30") as (first, second):
        while not (recipe.parent / "run").exists():  # rank 0 makes it once all are there
            assert first.poll() is None, first.communicate()
            time.sleep(0.01)
        second.send_signal(signal.SIGSTOP)
        output = first.communicate(timeout=400)[0]
    faults = [line for line in output.splitlines() if line.startswith("fault")]
    assert first.returncode == 1 and len(faults) == 1, output
    assert "rank 1 " in faults[0] and "did not finish" in faults[0]
