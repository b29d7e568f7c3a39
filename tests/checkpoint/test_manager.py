"""The run directory's lock, retention, saving behind the training, refusals, and starting from elsewhere."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch

from megalite.checkpoint import lock as lock_module
from megalite.checkpoint import tensor_file
from megalite.checkpoint.lock import LOCK, RunLock
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.source import CheckpointReader, load_weights
from megalite.config import build_config
from megalite.errors import UserError
from megalite.kernels import select_kernels
from megalite.mesh import Group, Mesh
from megalite.model.decoder import Stage
from megalite.model.shapes import model_shapes
from megalite.train.trainer import Trainer
from tests.checkpoint.support import Layout, assemble, forget, held, make_config, make_trainer, train
from tests.support.patience import PATIENCE_SECONDS
from tests.support.pool import Pool


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make_trainer(make_config(), Layout(), 0)


def manager_of(trainer: Trainer, run_dir: Path, **checkpoint: object) -> CheckpointManager:
    return CheckpointManager(run_dir, make_config(checkpoint={"keep": 0} | checkpoint), trainer.mesh)


# The lock


def holder(run_dir: Path, **changes: object) -> None:
    """Write a lock as another process would have left it."""
    lock = RunLock(run_dir)
    content = json.loads(lock.path.read_text()) | changes
    lock.path.write_text(json.dumps(content))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.fast
def test_two_managers_in_one_directory(trainer: Trainer, tmp_path: Path) -> None:
    with manager_of(trainer, tmp_path):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
            manager_of(trainer, tmp_path)
        with pytest.raises(UserError, match="in use by process"):
            manager_of(trainer, tmp_path)
    manager_of(trainer, tmp_path).close()
    assert not (tmp_path / LOCK).exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    holder(tmp_path, pid=dead_process())
    assert json.loads(RunLock(tmp_path).path.read_text())["pid"] == os.getpid()


def test_a_reused_process_number_is_not_the_holder(tmp_path: Path) -> None:
    holder(tmp_path, pid=os.getppid(), started="1")
    RunLock(tmp_path)


def test_the_lock_of_another_host_stands(tmp_path: Path) -> None:
    holder(tmp_path, host="elsewhere", pid=dead_process(), job_id="77")
    with pytest.raises(UserError, match=f"on elsewhere, job 77 restart 0; .* delete {tmp_path / LOCK}"):
        RunLock(tmp_path)


@pytest.mark.parametrize(
    ("then", "now", "free"),
    [
        (("77", "0", "0"), ("77", "1", "0"), True),
        (("77", "0", "0"), ("77", "0", "1"), True),
        (("77", "1", "0"), ("77", "0", "1"), False),
        (("77", "0", "0"), ("77", "0", "0"), False),
        (("77", "0", "0"), ("78", "1", "0"), False),
        (("", "0", "0"), ("", "1", "0"), False),
    ],
)
def test_a_requeued_slurm_job_takes_its_own_lock_over(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    then: tuple[str, str, str],
    now: tuple[str, str, str],
    free: bool,
) -> None:
    names = ("job_id", "restart_count", "step_id")
    holder(tmp_path, host="elsewhere", **dict(zip(names, then)))
    for name, value in zip(names, now):
        monkeypatch.setenv(f"SLURM_{name.upper()}", value)
    if free:
        RunLock(tmp_path)
    else:
        with pytest.raises(UserError, match="in use"):
            RunLock(tmp_path)


@pytest.mark.parametrize(
    ("namespace", "flock", "alive", "free"),
    [
        ("pid:[1]", True, True, False),
        ("pid:[1]", True, False, True),
        ("pid:[1]", False, False, False),
        ("", True, False, True),
    ],
)
def test_another_pid_namespace_of_this_kernel(
    tmp_path: Path, namespace: str, flock: bool, alive: bool, free: bool
) -> None:
    """Its process numbers mean nothing here; the kernel's own lock tells whether the holder lives."""
    lock = RunLock(tmp_path)
    content = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps(content | {"pid": dead_process(), "pid_namespace": namespace, "flock": flock}))
    if not alive:
        del lock
    if free:
        assert json.loads(RunLock(tmp_path).path.read_text())["pid"] == os.getpid()
    else:
        with pytest.raises(UserError, match="in use"):
            RunLock(tmp_path)


def test_containers_with_one_host_name(tmp_path: Path) -> None:
    """A container that starts while another of the same name trains: the same process number, another namespace."""
    program = (
        "import os, sys, time; from megalite.checkpoint.lock import RunLock\n"
        "try: lock = RunLock(sys.argv[1]); print(os.getpid(), flush=True); sys.stdin.readline()\n"
        "except Exception as error: print(error, flush=True)\n"
    )
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program, str(tmp_path)]
    if subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("pid namespaces need privileges")
    first, second = (subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "12")
    said = sorted(process.stdout.readline() for process in (first, second) if process.stdout)
    assert said[0] == "1\n" and "in use by process 1 on" in said[1]
    for process in (first, second):
        process.communicate("\n")
    RunLock(tmp_path)  # the winner has ended without a release


@pytest.mark.parametrize(
    ("machines", "namespace", "free"),
    [
        (("m", "m"), "pid:[4026531836]", True),  # this host has been started anew
        (("m", "n"), "pid:[4026531836]", False),
        (("", ""), "pid:[4026531836]", False),
        (("m", "m"), "pid:[5]", False),  # a container, whose machine-id may be its image's
    ],
)
def test_another_boot_of_this_host_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: tuple[str, str], namespace: str, free: bool
) -> None:
    real = lock_module._identity
    for machine, boot in zip(machines, ("old", "new")):
        own = {"machine": machine, "boot": boot, "pid_namespace": namespace}
        monkeypatch.setattr(lock_module, "_identity", lambda own=own: real() | own)
        if boot == "old" or free:
            RunLock(tmp_path)
        else:
            with pytest.raises(UserError, match="in use"):
                RunLock(tmp_path)


def test_a_lock_of_an_older_version_is_understood(tmp_path: Path) -> None:
    holder(tmp_path)
    content = json.loads((tmp_path / LOCK).read_text())
    for name in ("boot", "machine", "pid_namespace", "flock"):
        del content[name]
    (tmp_path / LOCK).write_text(json.dumps(content))
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps(content | {"pid": dead_process()}))
    RunLock(tmp_path)


@pytest.mark.parametrize("pid", [1e30, 10**30, 1 << 31, 0, -1, True, "1", None])
def test_a_process_number_that_is_none(tmp_path: Path, pid: object) -> None:
    holder(tmp_path, pid=pid)
    with pytest.raises(UserError, match="is not readable as a lock"):
        RunLock(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[" * 10_000, "\0", "1" * 5000, "[]", " " * 100_000, None, "pipe", "/dev/zero"]
)
def test_an_unreadable_lock_is_named(tmp_path: Path, content: str | None) -> None:
    if content is None:
        (tmp_path / LOCK).mkdir()
    elif content == "pipe":
        os.mkfifo(tmp_path / LOCK)
    elif content.startswith("/"):
        (tmp_path / LOCK).symlink_to(content)
    else:
        (tmp_path / LOCK).write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path / LOCK} is not readable as a lock"):
        RunLock(tmp_path)


def test_of_many_that_take_over_a_stale_lock_one_wins(tmp_path: Path) -> None:
    holder(tmp_path, pid=dead_process())
    program = (
        "import sys, time; from pathlib import Path\n"
        "from megalite.checkpoint.lock import RunLock\n"
        "sys.stdin.readline()\n"
        "try: RunLock(Path(sys.argv[1])); print('won', flush=True)\n"
        "except Exception as error: print(type(error).__name__, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("\n")
        rival.stdin.flush()
    results = [rival.stdout.readline().strip() for rival in rivals if rival.stdout]
    for rival in rivals:
        rival.communicate("\n")
    assert sorted(results) == ["UserError", "UserError", "UserError", "won"]


# What is kept


def test_retention(trainer: Trainer, tmp_path: Path) -> None:
    with manager_of(trainer, tmp_path, keep=2, keep_every=30, interval=10) as manager:
        kept = []
        for step in range(10, 110, 10):
            manager.save(trainer, {"step": step})
            kept.append(manager.steps())
    assert kept[:3] == [[10], [10, 20], [10, 20, 30]]
    assert kept[-1] == [30, 60, 80, 90, 100]


def test_order_is_by_step_whatever_the_clocks_say(trainer: Trainer, tmp_path: Path) -> None:
    with manager_of(trainer, tmp_path, keep=2) as manager:
        for step in (99_999_999, 100_000_000):
            manager.save(trainer, {"step": step})
        os.utime(manager.folder / "step_100000000", (1, 1))
        assert manager.load_latest(trainer) == {"step": 100_000_000}
        manager.save(trainer, {"step": 100_000_001})
        assert manager.steps() == [100_000_000, 100_000_001]


def test_remains_are_swept_and_strangers_left_alone(
    trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only directories under our own temporary names go; whatever else looks like them stays, and is named."""
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    ours = (
        "step_00000007.partial",
        "step_00000007.node-1.x-12.partial",
        "step_00000003.deleted",
        "step_00000003.deleted1",
    )
    strangers = ("step_x", "notes", "my.partial", "step_00000007.mine.deleted")
    for name in (*ours, *strangers, str(elsewhere)):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("content")
    files = ("download.partial", "step_00000009.partial", "step_00000009")
    for name in files:
        (folder / name).write_text("a file")
    (folder / "step_00000011.deleted").symlink_to(elsewhere)
    with manager_of(trainer, tmp_path) as manager:
        assert manager.load_latest(trainer) is None
        assert len(list(folder.iterdir())) == 12, "nothing is touched before the run is accepted"
        manager.accept()
        assert sorted(path.name for path in folder.iterdir()) == sorted((*strangers, *files))
        assert manager.save(trainer, {"step": 9}) and manager.steps() == [9]
    assert (elsewhere / "file").read_text() == "content"
    for name in ("my.partial", "download.partial", "step_00000009.partial"):
        assert f"{folder / name} was not made by a checkpoint's save: left alone" in caplog.text
    assert (folder / "step_00000009.damaged").read_text() == "a file", "what stood in the way was set aside"


def test_a_linked_checkpoint_is_deleted_as_a_link(trainer: Trainer, tmp_path: Path) -> None:
    """By retention, by a rollback, by a save of the same step, and after damage; what it stands for stays."""
    with manager_of(trainer, tmp_path / "other") as other:
        for step in (1, 2, 3, 4):
            other.save(trainer, {"step": step})
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)

    def link(step: int) -> None:
        (folder / f"step_{step:08d}").symlink_to(other.folder / f"step_{step:08d}")

    link(1)
    link(2)
    (folder / "step_00000001.deleted").write_text("in the way")
    with manager_of(trainer, tmp_path / "run", keep=1, allow_other_run=True) as manager:
        assert manager.load_latest(trainer) == {"step": 2}
        manager.save(trainer, {"step": 2})
        assert manager.steps() == [2] and not (folder / "step_00000002").is_symlink()
        link(3)
        manager.discard_after(2)
        assert manager.steps() == [2]
    link(4)
    (other.folder / "step_00000004" / "config.toml").unlink()
    with manager_of(trainer, tmp_path / "run", allow_other_run=True) as manager:
        assert manager.load_latest(trainer) == {"step": 2}
    assert (folder / "step_00000004.damaged").is_symlink()
    assert sorted(path.name for path in other.folder.iterdir()) == [f"step_{step:08d}" for step in (1, 2, 3, 4)]
    with CheckpointReader(other.folder / "step_00000002") as reader:
        assert not reader.verify()


def test_what_cannot_be_deleted_does_not_stop_a_start(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / "checkpoints" / "step_00000007.partial"
    left.mkdir(parents=True)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with manager_of(trainer, tmp_path) as manager:
        manager.accept()
        manager.save(trainer, {"step": 1})
        assert manager.steps() == [1]
    assert f"{left} could not be deleted" in caplog.text


def test_after_a_rollback_the_abandoned_course_is_gone(trainer: Trainer, tmp_path: Path) -> None:
    with manager_of(trainer, tmp_path) as manager:
        for step in (1, 2, 3, 4):
            manager.save(trainer, {"step": step})
        assert manager.load_latest(trainer, at_most=2) == {"step": 2}
        manager.discard_after(2)
        assert manager.steps() == [1, 2]


def test_configuration_and_tokenizer_travel_along(trainer: Trainer, tmp_path: Path) -> None:
    tokenizer = tmp_path / "mine.model"
    tokenizer.write_bytes(os.urandom(100))
    config = make_config(data={"tokenizer": str(tokenizer)})
    with CheckpointManager(tmp_path / "run", config, trainer.mesh) as manager:
        manager.save(trainer, {"step": 1})
    with CheckpointReader(tmp_path / "run") as reader:
        assert reader.tokenizer is not None and reader.tokenizer.read_bytes() == tokenizer.read_bytes()
        assert build_config(tomllib.loads(reader.extra("config.toml").decode())) == config


# Behind the training


def test_training_goes_on_while_the_checkpoint_is_written(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held up until training has changed everything; saved is the state at the time of the save."""
    trained, writer = threading.Event(), tensor_file._write_all

    def slow(descriptor: int, data: memoryview) -> None:
        assert trained.wait(PATIENCE_SECONDS)
        writer(descriptor, data)

    monkeypatch.setattr(tensor_file, "_write_all", slow)
    with manager_of(trainer, tmp_path, async_save=True) as manager:
        for step in (1, 2):  # the second save uses the same host memory again
            trained.clear()
            expected = assemble([held(trainer)])
            began = time.perf_counter()
            stall = manager.save(trainer, {"step": step})
            assert stall <= time.perf_counter() - began
            train(trainer, 1, step)
            assert manager.steps() == list(range(1, step)), "it was not written behind the training"
            trained.set()
            assert manager.wait() and manager.steps() == list(range(1, step + 1))
            after = assemble([held(trainer)])
            assert not torch.equal(after["weight", "lm_head.weight"], expected["weight", "lm_head.weight"])
            assert manager.load_latest(trainer) == {"step": step}
            loaded = assemble([held(trainer)])
            assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_a_save_waits_for_the_one_under_way(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = tensor_file._write_all

    def slow(descriptor: int, data: memoryview) -> None:
        time.sleep(0.002)
        writer(descriptor, data)

    monkeypatch.setattr(tensor_file, "_write_all", slow)
    with manager_of(trainer, tmp_path, async_save=True) as manager:
        first = manager.save(trainer, {"step": 1})
        second = manager.save(trainer, {"step": 2})
        assert second > 0.1 > first or second > 2 * first, "the stall counts the wait"
    assert [path.name for path in sorted(manager.folder.iterdir())] == ["step_00000001", "step_00000002"]


def _write_beside_a_sleeper(rank: int, run_dir: str) -> tuple[str, float]:
    """Rank 1 hangs for five seconds while it writes; the meshes' communications may take one."""
    mesh = Mesh(dp=2, rank=rank)
    trainer = Trainer(make_config(), mesh, select_kernels({}, torch.device("cpu")))
    trainer.initialise()
    with CheckpointManager(run_dir, make_config(checkpoint={"async_save": True}), mesh) as manager:
        mesh.set_timeout(1.0)
        if rank == 1:
            manager._write_own = lambda *_: time.sleep(5.0) or {"pieces": []}  # type: ignore[method-assign,func-returns-value]
        manager.save(trainer, {"step": 1})
        began = time.monotonic()
        try:
            manager.wait()
        except RuntimeError as error:
            return str(error), time.monotonic() - began
        finally:
            mesh.set_timeout(60.0)  # the pool's own barrier comes next
    return "", 0.0


def test_a_rank_that_hangs_while_it_writes_is_not_waited_for(pool: Pool, tmp_path: Path) -> None:
    """The limit of the training's communications holds for the agreement on a checkpoint, too."""
    (message, seconds), _ = pool.run(_write_beside_a_sleeper, 2, str(tmp_path))
    assert "imed out" in message and seconds < 4.0


# Refusals and other beginnings


@pytest.mark.fast
def test_another_model_is_refused_field_by_field(trainer: Trainer, tmp_path: Path) -> None:
    with manager_of(trainer, tmp_path) as manager:
        manager.save(trainer, {"step": 1})
    other = make_config(model={"heads": 3, "head_dim": 4, "rope_theta": 5e5})
    with CheckpointManager(tmp_path, other, trainer.mesh) as manager:
        with pytest.raises(UserError) as caught:
            manager.load_latest(make_trainer(other, Layout(), 0))
        for text in ("model.heads is 6 in the checkpoint and 3", "model.head_dim is 2", "model.rope_theta is 10000.0"):
            assert text in str(caught.value)
        assert manager.steps() == [1], "a sound checkpoint is not set aside"


def test_longer_positions_may_start_from_a_checkpoint(trainer: Trainer, tmp_path: Path) -> None:
    with manager_of(trainer, tmp_path / "a") as manager:
        manager.save(trainer, {"step": 1})
    longer = make_config(model={"max_positions": 64, "rope_theta": 1e6})
    with CheckpointManager(tmp_path / "b", longer, trainer.mesh) as manager:
        assert manager.load(make_trainer(longer, Layout(), 0), tmp_path / "a") == {"step": 1}


def test_other_data_are_refused_unless_allowed(trainer: Trainer, tmp_path: Path) -> None:
    with manager_of(trainer, tmp_path) as manager:
        manager.save(trainer, {"step": 1, "fingerprint": {"train": "a1", "valid": "b1"}})
        assert manager.load_latest(trainer, fingerprint={"train": "a1", "valid": "b1"})
        with pytest.raises(UserError, match=r"train was 'a1' and is 'a2'.*allow_data_change") as caught:
            manager.load_latest(trainer, fingerprint={"train": "a2", "valid": "b1"})
        assert "b1" not in str(caught.value)
    with manager_of(trainer, tmp_path, allow_data_change=True) as manager:
        assert manager.load_latest(trainer, fingerprint="other")


def test_weights_alone(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(train={"precision": "bf16"}), Layout(), 0)
    train(trainer, 2, 1)
    expected = assemble([held(trainer)])
    with manager_of(trainer, tmp_path / "a") as manager:
        manager.save(trainer, {"step": 2})
    with manager_of(trainer, tmp_path / "b") as manager:
        forget(trainer)
        assert manager.load(trainer, tmp_path / "a", optimizer=False) == {}
    assert trainer.optimizer.step_count == 0
    for (kind, name), values in assemble([held(trainer)]).items():
        wanted = expected[kind, name] if kind in ("weight", "parameter") else torch.zeros_like(values)
        assert torch.equal(values, wanted), (kind, name)


def test_a_start_from_nowhere_is_one_clear_error(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with manager_of(trainer, tmp_path / "run") as manager:
        with pytest.raises(UserError, match="does not exist"):
            manager.load(trainer, tmp_path / "nothing")
        with pytest.raises(UserError, match="holds no checkpoint"):
            manager.load(trainer, tmp_path / "empty")


def bare_stages(layout: Layout, rank: int, **model: object) -> list[Stage]:
    config = make_config(layout, model=dict(model))
    mesh = Mesh(pp=layout.pipeline, tp=layout.tensor, rank=rank, make_group=_no_group)
    kernels = select_kernels({"default": "reference"}, mesh.device)
    stages = [Stage(config.model, mesh, kernels, stage=mesh.index("pp"), owners=range(layout.pipeline), sequence=False)]
    for parameter in stages[0].parameters():
        parameter.data.fill_(torch.nan)
    return stages


def _no_group(ranks: tuple[int, ...], rank: int) -> Group:
    return Group(ranks, rank, None)


def test_weights_load_into_bare_stages_of_any_layout(trainer: Trainer, tmp_path: Path) -> None:
    with manager_of(trainer, tmp_path) as manager:
        manager.save(trainer, {"step": 1})
    expected = assemble([held(trainer)])
    layout, shapes = Layout(tensor=3, pipeline=2), model_shapes(trainer.config.model)
    with CheckpointReader(tmp_path) as reader:
        for rank in range(6):
            stages = bare_stages(layout, rank)
            load_weights(stages, reader, shapes)
            for parameter in stages[0].parameters():
                assert parameter.isfinite().all()
                for box in parameter.placement.boxes:
                    assert torch.equal(box.view(parameter.detach()), box.of(expected["weight", box.name]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"layers": 4}, "model.layers.3.* is missing"),
        ({"layers": 2}, "model.layers.2.* is not part of the model"),
        ({"vocab_size": 36}, r"has shape \[37, 12\], the model needs \[36, 12\]"),
        ({"attention_bias": True}, "bias is missing.* more differences"),
    ],
)
def test_weights_of_another_model_are_refused(trainer: Trainer, tmp_path: Path, model: dict, message: str) -> None:
    with manager_of(trainer, tmp_path) as manager:
        manager.save(trainer, {"step": 1})
    with CheckpointReader(tmp_path) as reader, pytest.raises(UserError, match=message):
        load_weights(bare_stages(Layout(), 0, **model), reader)
