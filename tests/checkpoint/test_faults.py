"""Whatever happens to files or processes: no checkpoint is wrong in silence, and the one before it is used."""

import contextlib
import errno
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.source import CheckpointReader
from megalite.errors import UserError
from megalite.train.trainer import Trainer
from tests.checkpoint.support import Layout, Pieces, assemble, forget, held, make_config, make_trainer, train
from tests.support.pool import Pool


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make_trainer(make_config(), Layout(), 0)


def manager_of(trainer: Trainer, run_dir: Path) -> CheckpointManager:
    return CheckpointManager(run_dir, trainer.config, trainer.mesh)


def save_two(trainer: Trainer, run_dir: Path) -> tuple[Pieces, Pieces]:
    """Checkpoints of steps 2 and 4; what the trainer held at each."""
    states = []
    with manager_of(trainer, run_dir) as manager:
        for step in (2, 4):
            train(trainer, 1, random.randrange(10**6))
            manager.save(trainer, {"step": step})
            assert manager.wait()
            states.append(held(trainer))
    return states[0], states[1]


def assert_holds(trainer: Trainer, expected: Pieces) -> None:
    now, then = assemble([held(trainer)]), assemble([expected])
    for key, values in then.items():
        assert torch.equal(now[key], values), key


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_is_found(trainer: Trainer, tmp_path: Path) -> None:
    save_two(trainer, tmp_path)
    folder = checkpoint(tmp_path, 4)
    for path in folder.iterdir():
        original = path.read_bytes()
        for position in [0, 7, 8, len(original) - 1, *random.sample(range(len(original)), 25)]:
            flip(path, position)
            with pytest.raises(UserError) as caught, CheckpointReader(folder) as reader:
                faults = reader.verify()
                raise UserError("; ".join(faults)) if faults else AssertionError(f"{path.name} byte {position}")
            assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
            path.write_bytes(original)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
    "truncated": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 8),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json", "config.toml"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_used(
    trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, name: str
) -> None:
    before, _ = save_two(trainer, tmp_path)
    DAMAGES[damage](checkpoint(tmp_path, 4) / name)
    with manager_of(trainer, tmp_path) as manager:
        forget(trainer)
        assert manager.load_latest(trainer) == {"step": 2}
        assert_holds(trainer, before)
        assert manager.steps() == [2]
    assert name in caplog.text and "step_00000004" in caplog.text, "the damage was not reported"
    assert (tmp_path / "checkpoints" / "step_00000004.damaged").is_dir(), "its content is kept"


def test_no_fresh_start_when_all_are_damaged(trainer: Trainer, tmp_path: Path) -> None:
    save_two(trainer, tmp_path)
    for step in (2, 4):
        flip(checkpoint(tmp_path, step) / "manifest.json", 100)
    with manager_of(trainer, tmp_path) as manager, pytest.raises(UserError, match="all checkpoints in"):
        manager.load_latest(trainer)
    assert checkpoint(tmp_path, 4).is_dir()


def load_damaged(rank: int, run_dir: str) -> tuple[dict | None, bool]:
    layout = Layout(tensor=2)
    trainer = make_trainer(make_config(layout), layout, rank)
    with CheckpointManager(run_dir, trainer.config, trainer.mesh) as manager:
        states = []
        for step in (2, 4):
            train(trainer, 1, step)
            manager.save(trainer, {"step": step})
            states.append(held(trainer))
        # Only what rank 1 reads is damaged.
        if rank == 1:
            path = manager.folder / "step_00000004" / "rank_00001.safetensors"
            flip(path, path.stat().st_size - 3)
        manager.steps()
        state = manager.load_latest(trainer)
    now = held(trainer)
    return state, all(torch.equal(a[2], b[2]) for key in now for a, b in zip(now[key], states[0][key], strict=True))


def test_all_ranks_take_the_same_checkpoint(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(load_damaged, 2, str(tmp_path)) == [({"step": 2}, True)] * 2


# Crashes

OPERATIONS = ("write", "fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir")


def crash_at(operation: int) -> Callable[[], int]:
    """End this process without a word at the given file operation from now on; a function that counts them."""
    count = 0

    def counted(original: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == operation:
                os._exit(9)
            return original(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    return lambda: count


def save_in_child(trainer: Trainer, run_dir: Path, state: dict, operation: int) -> int:
    """Save in a forked process that dies at a file operation; its exit code, 0 if it came through."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            crash_at(operation)
            with CheckpointManager(run_dir, trainer.config, trainer.mesh) as manager:
                manager.save(trainer, state)
                code = 0 if manager.wait() else 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_a_crash_at_any_file_operation_of_a_save(tmp_path: Path, again: bool) -> None:
    """With keep = 1, so that the save also deletes; every prefix of its file operations is tried."""
    trainer = make_trainer(make_config(model={"layers": 1}, checkpoint={"keep": 1}), Layout(), 0)
    contents: dict[str, Pieces] = {}
    for name in ("old", "new"):
        train(trainer, 1, random.randrange(10**6))
        contents[name] = held(trainer)
    new_state = {"step": 4 if again else 5, "content": "new"}
    operation, code, seen = 0, 9, []
    while code == 9:
        operation += 1
        run_dir = tmp_path / str(operation)
        with manager_of(trainer, run_dir) as manager:
            restore(trainer, contents["old"])
            manager.save(trainer, {"step": 4, "content": "old"})
        restore(trainer, contents["new"])
        code = save_in_child(trainer, run_dir, new_state, operation)
        with manager_of(trainer, run_dir) as manager:
            forget(trainer)
            state = manager.load_latest(trainer)
            assert state is not None, f"nothing was left after operation {operation}"
            assert_holds(trainer, contents[state["content"]])
            manager.accept()
            left = {path.name for path in manager.folder.iterdir()} - {f"step_{n:08d}" for n in manager.steps()}
            assert not left, f"remains of operation {operation}: {left}"
            seen.append(state["content"])
        shutil.rmtree(run_dir)
    assert code == 0 and operation > 15, "the operations were not counted"
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}, "the save takes effect at one moment"


def restore(trainer: Trainer, pieces: Pieces) -> None:
    """Give a one-rank trainer the state that `held` returned."""
    whole = assemble([pieces])
    with torch.no_grad():
        for segment in trainer.optimizer.segments:
            for box, where in segment.pieces():
                for kind, values in (("weight", segment.master), ("exp_avg", segment.state["exp_avg"])):
                    values[where] = box.of(whole[kind, box.name]).flatten()
                segment.state["exp_avg_sq"][where] = box.of(whole["exp_avg_sq", box.name]).flatten()


# Full disks and failing writes


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Files of this process can't grow beyond `limit` bytes: the kernel refuses in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.fast
@pytest.mark.parametrize("background", [False, True])
def test_a_failed_write_is_loud_counted_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, background: bool
) -> None:
    trainer = make_trainer(make_config(checkpoint={"async_save": background}), Layout(), 0)
    with manager_of(trainer, tmp_path) as manager:
        manager.save(trainer, {"step": 1})
        assert manager.wait()
        before = held(trainer)
        train(trainer, 1, 1)
        with file_size_limit(20_000):
            manager.save(trainer, {"step": 2})
            assert not manager.wait()
        assert manager.failures == 1
        assert "step_00000002" in caplog.text and os.strerror(errno.EFBIG) in caplog.text
        assert [path.name for path in manager.folder.iterdir()] == ["step_00000001"], "something was left"
        after = held(trainer)
        manager.save(trainer, {"step": 3})
        assert manager.wait() and manager.steps() == [1, 3]
        for step, expected in ((1, before), (3, after)):
            forget(trainer)
            assert manager.load_latest(trainer, at_most=step) == {"step": step}
            assert_holds(trainer, expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk(trainer: Trainer, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with manager_of(trainer, small_disk) as manager:
        manager.save(trainer, {"step": 1})
        assert manager.wait()
        before = held(trainer)
        (small_disk / "other").write_bytes(bytes(128 << 10))
        train(trainer, 1, 1)
        manager.save(trainer, {"step": 2})
        assert not manager.wait() and os.strerror(errno.ENOSPC) in caplog.text
        (small_disk / "other").unlink()
        manager.save(trainer, {"step": 3})
        assert manager.wait(), "the failed attempt still fills the disk"
        assert manager.load_latest(trainer, at_most=2) == {"step": 1}
        assert_holds(trainer, before)


def save_with_one_failing(rank: int, run_dir: str) -> tuple[bool, int, list[int], bool, str]:
    layout = Layout(tensor=2, pipeline=2)
    trainer = make_trainer(make_config(layout), layout, rank)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megalite.checkpoint.manager").addHandler(handler)
    with CheckpointManager(run_dir, trainer.config, trainer.mesh) as manager:
        with file_size_limit(2000) if rank == 3 else contextlib.nullcontext():
            manager.save(trainer, {"step": 1})
            failed = not manager.wait()
        manager.save(trainer, {"step": 2})
        return failed, manager.failures, manager.steps(), manager.wait(), " ".join(records)


def test_one_rank_that_cannot_write_fails_the_save_on_all(pool: Pool, tmp_path: Path) -> None:
    for failed, failures, steps, saved, records in pool.run(save_with_one_failing, 4, str(tmp_path)):
        assert failed and failures == 1 and steps == [2] and saved
        assert "rank 3: " in records and "rank 0: " not in records


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(make_config(), Layout(), 0)
    with manager_of(trainer, tmp_path) as manager:
        trainer.optimizer.segments[0].state["exp_avg"][5] = torch.inf
        manager.save(trainer, {"step": 1})
        assert not manager.wait() and "exp_avg of" in caplog.text
        assert manager.steps() == []
