"""A rank that hangs, one that is slow, one whose disk is full: its name is in the log and in the report."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.report.page import write_report
from megalite.report.remarks import remarks
from megalite.report.run_directory import read_runs
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.tiny import write_recipe

ROOT = Path(__file__).parents[2]

SLOW_RANK = """
import os, sys, time
from megalite.model.decoder import Stage
from megalite.train.__main__ import main
from megalite.runtime import leave
real = Stage.forward
def slow(self, *arguments):
    time.sleep(0.03)
    return real(self, *arguments)
if os.environ["RANK"] == "1":
    Stage.forward = slow
leave(main(sys.argv[1:]))
"""


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, train={"steps": 60, "micro_batch_size": 2})


@contextlib.contextmanager
def two_ranks(recipe, *arguments, program=("-m", "megalite.train"), limits=()):
    """Both ranks as processes of this test, without a launcher between; `limits` on the file size of rank 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

        def limit(rank=rank):
            if rank == 1 and limits:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        command = [sys.executable, *program, str(recipe), *arguments]
        output = (recipe.parent / f"output{rank}").open("w")
        environment = os.environ | place | meeting
        ranks.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=limit
            )
        )
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def said(recipe, rank):
    return (recipe.parent / f"output{rank}").read_text()


def log_of(recipe, rank):
    return (recipe.parent / "run" / "log" / f"rank_{rank:05d}.log").read_text()


def events(recipe):
    return [json.loads(line) for line in (recipe.parent / "run" / "events.jsonl").read_text().splitlines()]


def report(recipe):
    """The remarks on the run, and the text of its page."""
    runs = read_runs([recipe.parent / "run"])
    page = write_report(runs, recipe.parent / "report").read_text()
    return [remark.text for remark in remarks(runs[0]) if remark.serious], page


def wait_for_steps(recipe, count, ranks):
    metrics = recipe.parent / "run" / "metrics.jsonl"
    wait_until(
        lambda: metrics.read_bytes().count(b"\n") >= count, *ranks, told=lambda: said(recipe, 0) + said(recipe, 1)
    )


def test_a_rank_that_hangs_is_named(recipe):
    with two_ranks(recipe, "--train.steps", "100000", "--train.timeout_seconds", "3") as ranks:
        wait_for_steps(recipe, 5, ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        assert ranks[0].wait(PATIENCE_SECONDS) == 1
    assert "no answer from rank 1: dead or hung" in log_of(recipe, 0)
    assert [event["ranks"] for event in events(recipe) if event["event"] == "no_answer"] == [[1]]
    serious, page = report(recipe)
    assert any(text.startswith("No answer from rank 1") for text in serious), serious
    assert "No answer from rank 1" in page and "failed (exit code 1)" in page


def test_rank_0_may_be_the_one_that_hangs(recipe):
    """The job's store hangs with it, and the events are its to write."""
    with two_ranks(recipe, "--train.steps", "100000", "--train.timeout_seconds", "3") as ranks:
        wait_for_steps(recipe, 5, ranks)
        ranks[0].send_signal(signal.SIGSTOP)
        assert ranks[1].wait(PATIENCE_SECONDS) == 1
    assert "no answer from rank 0: dead or hung" in log_of(recipe, 1)
    serious, page = report(recipe)
    assert any(text.startswith("No answer from rank 0") for text in serious), serious
    assert "failed (exit code 1)" in page  # rank 1 has taken over the events


def test_a_slow_rank_is_named(recipe):
    with two_ranks(recipe, program=("-c", SLOW_RANK)) as ranks:
        assert [process.wait(120) for process in ranks] == [0, 0], said(recipe, 0)
    assert "step 50: rank 1 works longest" in log_of(recipe, 0)
    slow = [event for event in events(recipe) if event["event"] == "slow"]
    assert [event["rank"] for event in slow] == [1] and slow[0]["seconds"] > max(0.025, 1.25 * slow[0]["median"])
    serious, page = report(recipe)
    assert any("Rank 1" in text and "is slow" in text for text in serious), serious
    assert not any("Rank 0" in text for text in serious)
    assert "rank 1 at step 50" in page


def test_a_full_disk_is_told_with_the_ranks_name(recipe):
    options = ("--train.steps", "4", "--checkpoint.interval", "2")
    with two_ranks(recipe, *options, limits=(20_000, 20_000)) as ranks:
        assert ranks[0].wait(120) == 1 and ranks[1].wait(120) == 1
    for rank in (0, 1):
        assert "could not be saved" in log_of(recipe, rank) and "rank 1: " in log_of(recipe, rank)
    failed = [event for event in events(recipe) if event["event"] == "save_failed"]
    assert [event["step"] for event in failed] == [2, 4] and all("rank 1: " in event["why"] for event in failed)
    serious, page = report(recipe)
    assert any("could not be saved" in text and "rank 1" in text and "File too large" in text for text in serious)
    assert "checkpoint failed" in page
    assert not list((recipe.parent / "run" / "checkpoints").glob("step_*[0-9]"))
