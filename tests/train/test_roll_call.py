"""Where no wait fails, as with NCCL, a lost rank is named all the same: by a thread, before a watchdog ends all."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import wait_until
from tests.support.tiny import write_recipe

ROOT = Path(__file__).parents[2]

# A wait that would fail sits for ever instead, as a host does that copies from a device whose stream waits for a peer.
PROGRAM = """
import os, sys, time
from megalite import mesh
from megalite.runtime import leave
from megalite.train.__main__ import main
from megalite.train.reader import Reader
wait, read = mesh._Timed.wait, Reader.read
def sit(self):
    try:
        wait(self)
    except RuntimeError:
        time.sleep(1000)
def hang(self, first, samples):
    if os.path.exists(os.environ["HANG"]) and os.environ["RANK"] == "1":
        time.sleep(1000)
    return read(self, first, samples)
mesh._Timed.wait, Reader.read = sit, hang
leave(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("fate", ["killed", "hangs in its own code"])
def test_the_roll_is_called_where_no_wait_fails(tmp_path, fate):
    recipe = write_recipe(tmp_path, train={"steps": 10**6, "micro_batch_size": 2, "timeout_seconds": 4})
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "HANG": str(tmp_path / "hang")}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        output = (tmp_path / f"output{rank}").open("w")
        command = [sys.executable, "-c", PROGRAM, str(recipe)]
        ranks.append(
            subprocess.Popen(command, cwd=ROOT, env=os.environ | place | meeting, stdout=output, stderr=output)
        )
    try:
        wait_until(lambda: (tmp_path / "run/metrics.jsonl").read_bytes().count(b"\n") > 5, *ranks)
        if fate == "killed":
            ranks[1].send_signal(signal.SIGKILL)
            wait_until(lambda: "no answer from rank 1: dead or hung" in said(tmp_path), ranks[0])
            rows = (tmp_path / "run/events.jsonl").read_text().splitlines()
            wait_until(lambda: any(json.loads(row).get("ranks") == [1] for row in rows), ranks[0])
        else:
            (tmp_path / "hang").touch()
            wait_until(lambda: "but all ranks answer: rank 0 in" in said(tmp_path), *ranks)
            line = next(line for line in said(tmp_path).splitlines() if "all ranks answer" in line)
            assert "rank 1 in train/task.py" in line and line.count("train/task.py") == 1, line
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def said(folder):
    return (folder / "run/log/rank_00000.log").read_text()
