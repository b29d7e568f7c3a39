"""Jobs on a real SLURM, from submission to their end: finished, refused, or given up."""

import re
import subprocess
import sys
from pathlib import Path

from tests.slurm.conftest import ROOT, STEPS, Run


def test_a_run_to_its_end(undisturbed):
    assert undisturbed.steps() == list(range(1, STEPS + 1))
    assert "finished" in undisturbed.log.splitlines()[-1]
    network = undisturbed.cluster.network
    head = network.address("n0") if network else "127.0.0.1"
    job = int(undisturbed.jobs[0])
    assert f"meeting at {head}:{20000 + job * 16 % 12000}, from the beginning" in undisturbed.log
    outputs = sorted(path.name for path in undisturbed.folder.glob("log/slurm-*"))
    assert outputs == [f"slurm-{job}-r0-rank_{rank:05d}.out" for rank in range(2)]
    assert "error" not in undisturbed.log and not (undisturbed.folder / "run.lock").exists()


def test_a_finished_run_ends_at_once(undisturbed):
    """The same script again, as a chain does; and a new submission, where the trainer itself finds nothing to do."""
    run = Run(undisturbed.cluster, undisturbed.folder, undisturbed.recipe, sys.executable)
    submitted = undisturbed.cluster.command("sbatch", "--parsable", str(run.folder / "launch/001.sbatch"))
    run.jobs = [submitted.strip()]
    assert run.finish() == ("COMPLETED", "0:0")
    assert "the training has finished: nothing to do" in run.log
    before = run.weights()
    run.submit(options="")  # with the preflight
    assert run.finish() == ("COMPLETED", "0:0")
    assert run.weights() == before and len(run.steps()) == STEPS
    assert "collectives: pp" in run.log and "\nhealthy" in run.log


def test_the_ranks_are_in_the_nodes_order(cluster, tmp_path):
    """Two ranks a node: tensor parallelism, the innermost axis, stays inside nodes."""
    tell = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $SLURMD_NODENAME"'
    output = cluster.command(
        *["srun", "--immediate=10", "--nodes=2", "--ntasks-per-node=2"],
        f"--export=ALL,MEGALITE_OUTCOME={tmp_path}/outcome,MASTER_ADDR=x,MASTER_PORT=1",
        *("bash", str(ROOT / "launch/entry.sh"), "bash", "-c", tell),
    )
    assert sorted(output.splitlines()) == ["0 0 4 n0", "1 1 4 n0", "2 0 4 n1", "3 1 4 n1"]


def test_slurm_accepts_the_scripts(cluster, run):
    run.submit(options="--test-only --time 5 --mem 100 --cpus-per-task 2 --exclusive --extra-sbatch=--nice=5")
    assert not run.folder.exists()
    output = cluster.command(
        *(sys.executable, str(ROOT / "launch/slurm.py"), "--recipe", str(ROOT / "launch/recipes/1b.toml")),
        *["--nodes", "2", "--gpus-per-node", "2", "--test-only"],
    )
    assert re.search(r"Job \d+ to start at \S+ using \d+ processors on nodes n\[0-1\]", output)
    for wrong, message in (("--partition none", "invalid partition"), ("--mem 900G", "[Mm]emory|configuration")):
        words = f"--recipe {run.recipe} --nodes 2 --gpus-per-node 0 --test-only {wrong}".split()
        output = cluster.command(sys.executable, str(ROOT / "launch/slurm.py"), *words, check=False)
        assert re.match(f"error: sbatch refuses the job: .*(?:{message})", output) and output.count("\n") == 1


def test_sbatch_and_srun_read_names_as_they_are(cluster, run):
    """Quotation marks, spaces, SLURM's own patterns and shell's expansions in the run directory's name."""
    run.folder = run.folder.with_name('it\'s a "run" #1 at 50%j, $HOME `id`; &')
    run.python = "/bin/false"
    run.submit(options="--no-preflight --max-requeues 0")
    assert run.finish() == ("FAILED", "1:0")
    assert "giving up" in run.log
    assert len(list(run.folder.glob("log/slurm-*-rank_0000[01].out"))) == 2
    assert [path.name for path in run.folder.parent.iterdir() if path.is_dir()] == [run.folder.name]


def test_rank_0_listens_on_the_jobs_network_alone(run):
    run.submit("--train.steps", "5000")
    run.wait_for_step(2)
    place = re.search(r"meeting at ([0-9.]+):(\d+)", run.log)
    seen = subprocess.run(
        ["nsenter", "--net", f"--target={run.ranks()[0]}", "cat", "/proc/net/tcp", "/proc/net/tcp6"],
        capture_output=True, text=True, check=True,
    ).stdout if run.cluster.network else Path("/proc/net/tcp").read_text()  # fmt: skip
    hosts = {words[1] for line in seen.splitlines() if (words := line.split())[3] == "0A"}
    wanted = f":{int(place[2]):04X}"
    address = "".join(f"{int(part):02X}" for part in reversed(place[1].split(".")))
    assert {host for host in hosts if host.endswith(wanted)} == {address + wanted}


def test_an_unusable_configuration_is_not_tried_again(run):
    """What only the job can find: the token files are not there."""
    run.submit("--data.train", '["/nowhere/tokens"]')
    assert run.finish() == ("FAILED", "2:0")
    assert run.cluster.show(run.jobs[0], "Restarts") == "0"
    assert re.search(r"error: data.train .*/nowhere/tokens", run.log), run.log
    assert "not started again" in run.log


def test_failures_without_progress_are_not_forgiven_for_ever(run):
    """A trainer that cannot start: the job comes back as often as it may, and then fails with the trainer's code."""
    run.python = "/bin/false"
    run.submit(options="--no-preflight --max-requeues 1")
    assert run.finish() == ("FAILED", "1:0")
    assert run.cluster.show(run.jobs[0], "Restarts") == "1"
    assert "failure 2 since the last new checkpoint, 1 are forgiven" in run.log and "giving up" in run.log
    assert re.search(r"error: rank [01] on n[01] ended with code 1", run.log)


def test_an_unfit_node(run, tmp_path):
    """The preflight runs on every node before the ranks are started; what it says ends up in the job's log."""
    unfit = 'if [ "$SLURMD_NODENAME" = n1 ]; then echo "fault $SLURMD_NODENAME disk: full"; exit 1; fi'
    run.python.write_text(f"#!/bin/sh\n{unfit}\n")
    run.submit(options="--max-requeues 0")
    assert run.finish() == ("FAILED", "1:0")
    assert "fault n1 disk: full" in run.log and "the nodes are not fit" in run.log and "giving up" in run.log
    assert not list(run.folder.glob("log/slurm-*"))
