"""Which checksum a checkpoint has, by name; older ones; and files that are written past the page cache."""

import errno
import fcntl
import json
import logging
import os
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from megalite.checkpoint import checksum as checksum_module
from megalite.checkpoint import direct, tensor_file
from megalite.checkpoint.checksum import CRC32, XXH3_64, Checksum, agreed, find_checksum
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.manifest import MANIFEST
from megalite.checkpoint.source import CheckpointReader
from megalite.checkpoint.tensor_file import DamagedFile, write_tensor_file
from megalite.checkpoint.writer import CheckpointWriter
from megalite.errors import UserError
from tests.checkpoint.support import Layout, make_config, make_trainer, train
from tests.checkpoint.test_hostile import rewrite
from tests.checkpoint.test_inspect import inspect


def write(path: Path, values: torch.Tensor) -> Path:
    with CheckpointWriter(path, step=1, model={"layers": 1}, state={"step": 1}) as writer:
        writer.add("a.weight", values)
        writer.add_file("config.toml", b"[run]\n")
    return path


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """New checkpoints get this checksum: crc32 as if the package xxhash were missing."""
    if name == "crc32":
        monkeypatch.setattr(checksum_module, "XXH3_64", Checksum("xxh3_64", 16, None))


def as_version_1(folder: Path) -> None:
    """Make of a checkpoint with CRC-32 what megalite wrote before it named checksums."""

    def change(body: dict[str, Any]) -> None:
        assert body.pop("checksum") == "crc32" and body["version"] == 2
        body["version"] = 1

    rewrite(folder, change)


@pytest.mark.fast
def test_values_are_those_of_zlib_and_xxhash() -> None:
    for length in (0, 1, 239, 241, 100_003):
        data = random.randbytes(length)
        assert CRC32(data) == f"{zlib.crc32(data):08x}"
        assert XXH3_64(memoryview(data)) == xxhash.xxh3_64_hexdigest(data)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["xxh3_64", "crc32", "version 1"])
def test_any_byte_of_any_file_is_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    values = torch.randn(random.randrange(1, 40), 7)
    with monkeypatch.context() as patch:
        use(patch, "xxh3_64" if kind == "xxh3_64" else "crc32")
        folder = write(tmp_path / "step_00000001", values)
    if kind == "version 1":
        as_version_1(folder)
    body = json.loads((folder / MANIFEST).read_bytes())["checkpoint"]
    assert body.get("checksum", kind) == kind
    with CheckpointReader(folder) as reader:
        assert reader.verify() == [] and torch.equal(reader.read("a.weight", (0, 0), tuple(values.shape)), values)
    for path in folder.iterdir():
        original = path.read_bytes()
        for position in {0, len(original) - 1, *random.sample(range(len(original)), min(len(original), 20))}:
            data = bytearray(original)
            data[position] ^= 1 << random.randrange(8)
            path.write_bytes(data)
            with pytest.raises(DamagedFile), CheckpointReader(folder) as reader:
                faults = reader.verify()
                raise DamagedFile("; ".join(faults)) if faults else AssertionError(f"{path.name} byte {position}")
        path.write_bytes(original)


@pytest.mark.parametrize("name", ["md5", "", 7, None, ["crc32"], "xxh3_64\n"])
def test_an_unknown_name_is_refused_and_is_no_damage(tmp_path: Path, name: object) -> None:
    folder = write(tmp_path / "step_00000001", torch.randn(3, 4))
    rewrite(folder, lambda body: body.update(checksum=name))
    with pytest.raises(UserError, match="this megalite knows crc32, xxh3_64") as caught:
        CheckpointReader(folder)
    assert not isinstance(caught.value, DamagedFile), "it would be set aside"
    assert str(folder / MANIFEST) in str(caught.value) and "\n" not in str(caught.value)
    if name == "md5":
        shown = inspect(folder)
        assert shown.returncode == 2 and shown.stderr.count("\n") == 1 and "'md5'" in shown.stderr


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "step_00000001", torch.randn(3, 4))
    monkeypatch.setitem(checksum_module._KNOWN, "xxh3_64", Checksum("xxh3_64", 16, None))
    with pytest.raises(UserError, match="pip install xxhash"):
        CheckpointReader(folder)
    assert find_checksum("crc32", folder) is CRC32
    assert agreed(["xxh3_64", "crc32"]) is CRC32 and agreed(["xxh3_64"] * 2) is XXH3_64


def test_a_run_goes_on_from_old_checkpoints_with_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One of each kind in a directory; the newest is damaged and the older one of version 1 is taken."""
    trainer = make_trainer(make_config(), Layout(), 0)
    folders = {}
    for step, name in ((1, "crc32"), (2, "xxh3_64")):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            use(patch, name)
            caplog.clear()
            with CheckpointManager(tmp_path, trainer.config, trainer.mesh) as manager:
                train(trainer, 1, step)
                manager.save(trainer, {"step": step})
                assert manager.wait()
            assert ("the package xxhash is missing" in caplog.text) == (name == "crc32"), "the fallback is said"
        folders[step] = tmp_path / "checkpoints" / f"step_{step:08d}"
        assert json.loads((folders[step] / MANIFEST).read_bytes())["checkpoint"]["checksum"] == name
    as_version_1(folders[1])
    with CheckpointManager(tmp_path, trainer.config, trainer.mesh) as manager:
        assert manager.load_latest(trainer) == {"step": 2}
        path = folders[2] / "rank_00000.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert manager.load_latest(trainer) == {"step": 1}


# Past the page cache


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few kilobytes are written in blocks of two pages."""
    monkeypatch.setattr(direct, "_BLOCK", 8192)
    monkeypatch.setattr(tensor_file, "_DIRECT_BYTES", 0)


def refuse_direct(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """A file system without direct writes, which says so at once or only at the first write."""
    control, pwrite = fcntl.fcntl, os.pwrite

    def no_flag(descriptor: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(descriptor, command, value)

    def no_write(descriptor: int, data: memoryview, position: int) -> int:
        if control(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data[:5000], position)  # and short at that

    if at == "flag":
        monkeypatch.setattr("fcntl.fcntl", no_flag)
    elif at == "write":
        monkeypatch.setattr("os.pwrite", no_write)


@pytest.mark.fast
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("refused", ["never", "flag", "write"])
def test_direct_files_hold_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    refuse_direct(monkeypatch, refused)
    for sizes in ((0,), (1,), (8192 // 4,), (3, 0, 5000, 1), tuple(random.randrange(20_000) for _ in range(6))):
        tensors = [(str(number), torch.randn(size)) for number, size in enumerate(sizes)]
        path = tmp_path / "x.safetensors"
        written = write_tensor_file(path, tensors, {"format": "pt"}, XXH3_64)
        content = path.read_bytes()
        assert written.size == len(content)
        assert content.endswith(b"".join(tensor.numpy().tobytes() for _, tensor in tensors))
        assert written.tensor_checksums == [xxhash.xxh3_64_hexdigest(tensor.numpy().tobytes()) for _, tensor in tensors]
        stored = load_file(path)
        assert all(torch.equal(stored[name], tensor) for name, tensor in tensors)
        path.unlink()


@pytest.mark.usefixtures("small_blocks")
def test_a_disk_that_fills_up_in_a_direct_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def full(descriptor: int, data: memoryview, position: int) -> int:
        if position + len(data) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, position)

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write(tmp_path / "step_00000001", torch.randn(30_000))
    assert not list(tmp_path.iterdir()), "something was left"
