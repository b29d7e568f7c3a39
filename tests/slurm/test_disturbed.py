"""What happens to a running job on a real SLURM, and that it ends with the weights of an undisturbed one."""

import os
import re
import signal
import time

import pytest

from tests.slurm.cluster import until
from tests.slurm.conftest import STEPS

pytestmark = pytest.mark.slow


def assert_as_undisturbed(run, undisturbed):
    assert run.finish() == ("COMPLETED", "0:0"), run.log
    assert run.steps() == list(range(1, STEPS + 1))
    assert run.weights() == undisturbed.weights()
    assert not (run.folder / "run.lock").exists()


def test_preempted(run, undisturbed):
    """A job of higher priority takes the nodes: checkpoint within the grace time, back to the queue, on from there."""
    run.submit(options="--no-preflight --exclusive")
    run.wait_for_step(3)
    run.cluster.command(
        *["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"], "--wrap", "sleep 1"
    )
    run.wait_for_log("given back to the queue")
    saved = run.checkpoints()[-1]
    assert f"it goes on from step_{saved:08d}" in run.log and saved < STEPS and saved == run.steps()[-1]
    assert_as_undisturbed(run, undisturbed)
    # At least: SLURM may let the job in while the other's nodes are still being cleared, and take them back.
    assert int(run.cluster.show(run.jobs[0], "Restarts")) >= 1
    assert f"resumed at step {saved}" in run.rank_log(0)


def test_asked_to_stop_by_the_user(run):
    """SIGINT to the batch script: saved, and not back."""
    run.submit()
    run.wait_for_step(2)
    run.cluster.command("scancel", "--batch", "--signal=INT", run.jobs[0])
    assert run.finish() == ("FAILED", "75:0")
    assert run.checkpoints()[-1] == run.steps()[-1] < STEPS
    assert "stopped for good" in run.log


def test_cancelled(run, tmp_path):
    """scancel ends a job for good, although its script would have it requeued after a failure."""
    run.python.write_text(f"#!/bin/sh\ntouch {tmp_path}/running\nexec sleep 100\n")
    run.submit()
    until((tmp_path / "running").exists, "a rank runs")
    run.cluster.command("scancel", run.jobs[0])
    assert run.finish()[0] == "CANCELLED"
    assert "SLURM has ended this start" in run.log and "a rank failed" not in run.log
    time.sleep(2)
    assert run.cluster.show(run.jobs[0], "JobState") == "CANCELLED"
    assert run.cluster.show(run.jobs[0], "Restarts") == "0"


def test_a_request_during_start_up_is_not_lost(run):
    """The ranks still import their libraries: the request must neither kill them nor be forgotten."""
    run.submit()
    until(lambda: len(run.ranks()) == 2, "the ranks have been started")
    run.cluster.command("scancel", "--batch", "--signal=INT", run.jobs[0])
    assert run.finish() == ("FAILED", "75:0")
    assert (run.steps() or [0])[-1] < STEPS
    assert "error" not in run.log


def test_a_node_is_killed(run, undisturbed):
    """Power off: SLURM notices, gives the job back by itself, and it resumes when the node has come back."""
    run.submit()
    run.wait_for_step(7)
    run.cluster.kill_node("n1")
    until(lambda: run.cluster.show(run.jobs[0], "JobState") == "PENDING", "SLURM gives the job back")
    run.cluster.start_node("n1")
    assert_as_undisturbed(run, undisturbed)
    assert re.search(r"resumed at step \d*[50]\b", run.rank_log(0))


def test_a_rank_is_killed(run, undisturbed, overdue):
    run.submit()
    run.wait_for_step(7)
    os.kill(run.ranks()[1], signal.SIGKILL)
    run.wait_for_log("given back to the queue")
    assert "error: rank 1 on n1 was ended by SIGKILL" in run.log
    assert "failure 1 since the last new checkpoint, 3 are forgiven" in run.log
    assert_as_undisturbed(run, undisturbed)


def test_a_hung_rank_is_named(run, undisturbed):
    run.submit()
    run.wait_for_step(7)
    os.kill(run.ranks()[1], signal.SIGSTOP)
    run.wait_for_log("given back to the queue")
    assert "no answer from rank 1: dead or hung" in run.log
    assert_as_undisturbed(run, undisturbed)


def test_a_full_disk_is_named(run, tmp_path):
    """Files may grow to 10 KiB: enough for logs, not for checkpoints. Training goes on, and fails at its end."""
    setup = tmp_path / "setup.sh"
    setup.write_text("ulimit -f 10\n")
    run.submit("--train.stop_after", "6", options=f"--no-preflight --max-requeues 0 --setup {setup}")
    state, code = run.finish()
    assert state == "FAILED" and code != "75:0"
    assert re.search(r"could not be saved .*rank [01]: .*File too large", run.log), run.log
    assert run.checkpoints() == [] and "giving up" in run.log


def test_time_limit_and_the_chains_next_job(run):
    """Time is over: the first job of the chain saves and ends, the second goes on, in a job of its own.

    SLURM may ask as much as a minute early: in a job of one minute that can be before the first step.
    """
    first, second = run.submit(
        "--train.steps", "5000", "--checkpoint.interval", "1000", options="--no-preflight --chain 2 --time 2"
    )
    until(lambda: run.cluster.show(first, "JobState") == "FAILED", "the first job ends in time")
    assert run.cluster.show(first, "ExitCode") == "75:0"
    assert "SIGUSR1: asking the ranks" in run.log and "the next job of the chain goes on from" in run.log
    saved = run.checkpoints()[-1]
    until(lambda: (run.steps() or [0])[-1] > saved, "the second job goes on")
    assert run.cluster.show(second, "JobState") == "RUNNING"
    assert f"resumed at step {saved}" in run.rank_log(0)
    assert run.steps()[: saved + 1] == list(range(1, saved + 2))


def test_a_time_limit_that_passes_before_the_ranks_have_stopped(overdue):
    """SLURM kills ranks and script within seconds, and would not start the job again by itself."""
    overdue.wait_for_log("the time limit has passed before the ranks had stopped")
    job = overdue.jobs[0]
    until(lambda: overdue.cluster.show(job, "Restarts") >= "1", "the job is back in the queue")
    until(lambda: "resumed at step" in overdue.rank_log(0), "it goes on")
    assert "given back to the queue" in overdue.log
    overdue.end()  # on both nodes, one of which the next test cuts off


def test_a_cut_off_start_is_fenced(run):
    """The cable of a node is pulled while its rank trains on: SLURM starts the job on the other node, and the old rank
    notices that the run directory is not its own any more."""
    if run.cluster.network is None:
        pytest.skip("needs network namespaces (root and iproute2)")
    run.submit("--train.steps", "5000", nodes=1, layout=())
    run.wait_for_step(3)
    node = run.cluster.show(run.jobs[0], "NodeList")
    old = run.ranks()[0]
    run.cluster.network.plug(node, up=False)
    try:
        until(lambda: run.cluster.show(run.jobs[0], "NodeList") not in (node, "(null)", ""), "the other node")
        assert os.path.exists(f"/proc/{old}")
        until(lambda: not os.path.exists(f"/proc/{old}"), "the old rank has ended")
        assert re.search(rf"TakenOver: run.dir = .* was taken over by .* job {run.jobs[0]} restart 1", run.rank_log(0))
        saved = run.checkpoints()[-1]
        until(lambda: run.checkpoints()[-1] > saved, "the new start saves")
        # Still without the node: SLURM may end the new step, too, when it hears of the old one.
        run.cluster.command("scancel", "--batch", "--signal=INT", run.jobs[0])
        assert run.finish() == ("FAILED", "75:0")
    finally:
        run.cluster.network.plug(node, up=True)
    for step in run.checkpoints():
        run.weights(step)
