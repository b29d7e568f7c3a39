"""A start that SLURM has given up, and that lives on behind a cut network, cannot harm what the next start writes."""

import json
import shutil
from pathlib import Path

import pytest

from megalite.checkpoint import manager as manager_module
from megalite.checkpoint.directory import prepare, sweep
from megalite.checkpoint.lock import ENDED_JOB_ENVIRONMENT, LOCK, RunLock, TakenOver
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.source import CheckpointReader
from megalite.errors import UserError
from megalite.train.trainer import Trainer
from tests.checkpoint.support import Layout, make_config, make_trainer

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make_trainer(make_config(), Layout(), 0)


def job(monkeypatch: pytest.MonkeyPatch, number: str, restart: int, step: int = 0) -> None:
    for name, value in (("JOB_ID", number), ("RESTART_COUNT", str(restart)), ("STEP_ID", str(step))):
        monkeypatch.setenv(f"SLURM_{name}", value)


def manager_of(trainer: Trainer, run_dir: Path, **checkpoint: object) -> CheckpointManager:
    return CheckpointManager(run_dir, make_config(checkpoint={"keep": 0} | checkpoint), trainer.mesh)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("async_save", [False, True])
def test_an_old_start_cannot_save(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    job(monkeypatch, "7", 0)
    old = manager_of(trainer, tmp_path, async_save=async_save)
    old.save(trainer, {"step": 1})
    old.wait()
    job(monkeypatch, "7", 1)  # on the same host, where the old process is alive
    new = manager_of(trainer, tmp_path)
    new.save(trainer, {"step": 2})
    before = content(tmp_path)
    with pytest.raises(TakenOver, match=r"was taken over by process \d+ on \S+, job 7 restart 1; this start ends"):
        old.save(trainer, {"step": 2})
        old.wait()
    with pytest.raises(TakenOver):
        old.discard_after(0)
    old.close()
    assert content(tmp_path) == before
    assert new.steps() == [1, 2]
    new.close()
    assert not (tmp_path / LOCK).exists()


def test_an_old_start_that_is_taken_over_amid_a_save(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one has begun to write, the new one begins, and both write the same step at once."""
    job(monkeypatch, "7", 0)
    old = manager_of(trainer, tmp_path)
    write_own, taken = CheckpointManager._write_own, []

    def slow(self: CheckpointManager, partial: Path, snapshot: object) -> dict[str, object]:
        if self is old:
            job(monkeypatch, "7", 1)
            new = manager_of(trainer, tmp_path)
            taken.append(new)
            monkeypatch.setattr(CheckpointManager, "_write_own", write_while_both)
            new.save(trainer, {"step": 5})
            return write_own(self, partial, snapshot)  # type: ignore[arg-type]
        raise AssertionError

    def write_while_both(self: CheckpointManager, partial: Path, snapshot: object) -> dict[str, object]:
        report = write_own(self, partial, snapshot)  # type: ignore[arg-type]
        with pytest.raises(TakenOver):
            old._prepare(old.folder / "step_00000005")
        return report

    monkeypatch.setattr(CheckpointManager, "_write_own", slow)
    old.save(trainer, {"step": 5})
    assert old.failures == 1  # its directory had been swept away
    new = taken[0]
    with CheckpointReader(new.folder / "step_00000005") as reader:
        reader.verify()
    assert [path.name for path in new.folder.iterdir()] == ["step_00000005"]
    new.close()


def test_two_holders_write_into_different_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an old start has open or opens late, it is not a file of the new one's."""
    final, names = tmp_path / "step_00000005", set()
    for host in ("a", "b"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        lock = RunLock(tmp_path / host)
        names.add(prepare(final, lock.token).name)
    assert len(names) == 2 and sorted(path.name for path in sweep(tmp_path)) == sorted(names)


def test_the_loop_looks_now_and_then(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(monkeypatch, "7", 0)
    old = manager_of(trainer, tmp_path)
    job(monkeypatch, "7", 0, step=1)
    RunLock(tmp_path)
    old.guard()  # looked a moment ago
    monkeypatch.setattr(manager_module, "_LOOK_SECONDS", 0.0)
    with pytest.raises(TakenOver, match="restart 0"):
        old.guard()


def test_an_older_start_does_not_take_the_lock_of_a_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the newer one's process is gone: the job's script that could still start one is out of date."""
    job(monkeypatch, "7", 2)
    lock = RunLock(tmp_path)
    lock.path.write_text(json.dumps(json.loads(lock.path.read_text()) | {"pid": 2**22 + 1}))
    job(monkeypatch, "7", 1)
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path)


def test_a_job_that_slurm_calls_over_gives_its_lock_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next job of a chain, on another host than the one that was killed at its time limit."""
    job(monkeypatch, "7", 3)
    lock = RunLock(tmp_path)
    lock.path.write_text(json.dumps(json.loads(lock.path.read_text()) | {"host": "elsewhere"}))
    job(monkeypatch, "8", 0)
    for ended in ("9", ""):
        monkeypatch.setenv(ENDED_JOB_ENVIRONMENT, ended)
        with pytest.raises(UserError, match="in use"):
            RunLock(tmp_path)
    monkeypatch.setenv(ENDED_JOB_ENVIRONMENT, "7")
    RunLock(tmp_path)
    with pytest.raises(TakenOver, match="job 8"):
        lock.verify()


def test_a_deleted_lock_is_made_again(trainer: Trainer, tmp_path: Path) -> None:
    with manager_of(trainer, tmp_path) as manager:
        (tmp_path / LOCK).unlink()
        manager.save(trainer, {"step": 1})
        assert (tmp_path / LOCK).exists() and manager.steps() == [1]
        shutil.rmtree(manager.folder)
