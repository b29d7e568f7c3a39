"""Manifests and safetensors files that nobody honest wrote: each ends in one clear error, and quickly."""

import json
import math
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint.checksum import CRC32, XXH3_64
from megalite.checkpoint.manifest import MANIFEST, Piece, tiling_fault
from megalite.checkpoint.source import CheckpointReader
from megalite.checkpoint.tensor_file import TensorFile, write_tensor_file
from megalite.checkpoint.writer import CheckpointWriter
from megalite.errors import UserError

Body = dict[str, Any]

CHECKSUM = XXH3_64.name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "step_00000001"
    with CheckpointWriter(path, step=1, model={"layers": 1}, state={"step": 1}, shard_bytes=100) as writer:
        values = torch.randn(6, 5)
        for rows in (0, 2):
            part = values[rows : rows + 2 + rows]
            writer.add("matrix", part, shape=(6, 5), offset=(rows, 0))
        writer.add("vector", torch.randn(7).bfloat16())
        writer.add_file("config.toml", b"[run]\n")
    return path


def rewrite(folder: Path, change: Callable[[Body], object]) -> None:
    """Change the manifest's content and give it a checksum that matches."""
    path = folder / MANIFEST
    body = json.loads(path.read_bytes())["checkpoint"]
    change(body)
    text = json.dumps(body).encode()
    path.write_bytes(b'{"crc32": "%08x", "checkpoint": ' % zlib.crc32(text) + text + b"}\n")


def pieces(body: Body) -> list[Body]:
    return body["tensors"]["weight"]["matrix"]["pieces"]


def elsewhere(body: Body, name: str) -> None:
    body["files"][name] = body["files"].pop("part_00000.safetensors")
    for piece in pieces(body):
        piece["file"] = name if piece["file"] == "part_00000.safetensors" else piece["file"]


LIES: dict[str, tuple[Callable[[Body], object], str]] = {
    "path traversal": (lambda body: elsewhere(body, "../../secret"), "not a plain name"),
    "absolute path": (lambda body: elsewhere(body, "/etc/passwd"), "not a plain name"),
    "extra outside": (lambda body: body["extras"].update({"../x": {"bytes": 1, CHECKSUM: "0" * 16}}), "not a plain"),
    "a file not listed": (lambda body: pieces(body)[0].update(file="other"), "unlisted file 'other'"),
    "a hole": (lambda body: pieces(body).pop(), "hold 10 of its 30 elements"),
    "an overlap": (lambda body: pieces(body)[1].update(offset=[1, 0]), "overlap"),
    "beyond the shape": (lambda body: pieces(body)[1].update(offset=[4, 0]), "beyond shape"),
    "another rank": (lambda body: pieces(body)[1].update(offset=[2], size=[4]), "dimensions"),
    "negative": (lambda body: pieces(body)[0].update(offset=[-1, 0]), "impossible"),
    "empty pieces": (lambda body: pieces(body)[0].update(size=[0, 5]), "impossible"),
    "huge": (lambda body: body["tensors"]["weight"]["matrix"].update(shape=[1 << 40, 1 << 40]), "impossible shape"),
    "a number as text": (lambda body: pieces(body)[0].update(size=["2", 5]), "impossible"),
    "true as a number": (lambda body: body.update(step=True), "not a count"),
    "dtype unknown": (lambda body: body["tensors"]["weight"]["matrix"].update(dtype="O"), "dtype 'O' is not known"),
    "dtype of another size": (lambda body: body["tensors"]["weight"]["matrix"].update(dtype="F16"), "torch.float16"),
    "kind unknown": (lambda body: body["tensors"].update({"../evil": {}}), "kinds of tensors"),
    "no weights": (lambda body: body["tensors"].pop("weight"), "kinds of tensors"),
    "moments of another shape": (
        lambda body: body["tensors"].update(exp_avg={"vector": body["tensors"]["weight"]["matrix"]}),
        "describe different tensors, vector",
    ),
    "no checksum": (lambda body: pieces(body)[0].pop(CHECKSUM), "no checksum"),
    "wrong checksum": (lambda body: pieces(body)[0].update({CHECKSUM: "0" * 16}), "does not match its checksum"),
    "wrong size": (lambda body: body["files"]["part_00000.safetensors"].update(bytes=5), "5 were written"),
    "another format": (lambda body: body.update(format="pickle"), "format is 'pickle'"),
    "a run that is no id": (lambda body: body.update(run="../x"), "run is not the id"),
    "a run of another type": (lambda body: body.update(run=[]), "run is not the id"),
    "another version": (lambda body: body.update(version=9), "has version 9"),
    "lists for objects": (lambda body: body.update(tensors=[]), "'tensors' is missing or not an object"),
    "text for an object": (lambda body: body["tensors"]["weight"].update(matrix="x"), "matrix: not an object"),
}


@pytest.mark.fast
@pytest.mark.parametrize("lie", LIES)
def test_lying_manifests(folder: Path, lie: str) -> None:
    change, message = LIES[lie]
    rewrite(folder, change)
    with pytest.raises(UserError) as caught, CheckpointReader(folder) as reader:
        faults = reader.verify()
        raise UserError("; ".join(faults)) if faults else AssertionError("believed")
    assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"crc32": 5}', b"null"])
def test_no_manifest_at_all(folder: Path, text: bytes) -> None:
    for content in (text, b'{"crc32": "%08x", "checkpoint": ' % zlib.crc32(text) + text + b"}\n"):
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(UserError, match=MANIFEST):
            CheckpointReader(folder)


@pytest.mark.parametrize("name", [MANIFEST, "part_00000.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "directory"])
def test_what_is_no_plain_file(folder: Path, name: str, kind: str) -> None:
    """A pipe would wait for ever, and a device never ends."""
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "endless":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is not a regular file"), CheckpointReader(folder) as reader:
        raise UserError("; ".join(reader.verify()))


def header_file(path: Path, header: Any, data: bytes = bytes(40), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(**changes: Any) -> Body:
    return {"t": {"dtype": "F32", "shape": [2, 5], "data_offsets": [0, 40]} | changes}


BAD_FILES: dict[str, tuple[Any, int | None, str]] = {
    "huge header": (tensor(), 1 << 62, "the header claims"),
    "header past the end": (tensor(), 500, "the header claims"),
    "not JSON": (b"{{", None, "not valid JSON"),
    "deep": (b"[" * 100_000, None, "not valid JSON"),
    "a list": ([], None, "not a JSON object"),
    "entry is text": ({"t": "x"}, None, "not an object"),
    "dtype": (tensor(dtype="I64"), None, "dtype 'I64'"),
    "dtype is a list": (tensor(dtype=[]), None, "dtype []"),
    "past the end": (tensor(shape=[2, 6], data_offsets=[0, 48]), None, "truncated"),
    "too few bytes": (tensor(data_offsets=[0, 36]), None, "needs 40"),
    "backwards": (tensor(data_offsets=[40, 0]), None, "needs 40"),
    "negative": (tensor(data_offsets=[-40, 0]), None, "impossible"),
    "huge shape": (tensor(shape=[1 << 60]), None, "impossible"),
    "no offsets": (tensor(data_offsets=None), None, "impossible"),
    "metadata": ({"__metadata__": 5}, None, "__metadata__"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_safetensors_files(tmp_path: Path, name: str) -> None:
    header, length, message = BAD_FILES[name]
    path = header_file(tmp_path / "file.safetensors", header, length=length)
    with pytest.raises(UserError) as caught:
        TensorFile(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_every_truncation_of_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensor_file(path, [("a", torch.randn(3, 3)), ("b", torch.randn(2))], {}, CRC32)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"truncated|damaged"):
            TensorFile(path)


def test_other_programs_read_the_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"x": torch.randn(3, 5), "y": torch.randn(4).bfloat16(), "z": torch.randn(()).half()}
    path = tmp_path / "file.safetensors"
    write_tensor_file(path, list(tensors.items()), {"format": "pt"}, CRC32)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    with TensorFile(path) as file:
        for name, values in tensors.items():
            assert torch.equal(loaded[name], values) and torch.equal(file.read(name), values)
        assert torch.equal(file.read("x", 1, 3), tensors["x"][1:])


def brute_force(shape: tuple[int, ...], boxes: list[Piece]) -> bool:
    count = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        if any(start + length > extent for start, length, extent in zip(box.offset, box.size, shape)):
            return False
        count[tuple(slice(start, start + length) for start, length in zip(box.offset, box.size))] += 1
    return bool((count == 1).all())


def random_tiling(shape: tuple[int, ...]) -> list[Piece]:
    boxes = [Piece("f", (0,) * len(shape), shape, 0)]
    for _ in range(random.randrange(6)):
        box = boxes.pop(random.randrange(len(boxes)))
        dim = random.randrange(len(shape))
        cut = random.randrange(box.size[dim]) if box.size[dim] > 1 else 0
        for start, length in ((0, cut), (cut, box.size[dim] - cut)):
            if length:
                offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
                boxes.append(Piece("f", offset, (*box.size[:dim], length, *box.size[dim + 1 :]), 0))
    return boxes


def test_holes_and_overlaps_are_found_whatever_the_cuts() -> None:
    verdicts = set()
    for _ in range(2000):
        shape = tuple(random.randint(1, 6) for _ in range(random.randint(1, 3)))
        boxes = random_tiling(shape)
        if random.random() < 0.6:
            box = boxes.pop(random.randrange(len(boxes)))
            offset = tuple(max(0, start + random.randint(-1, 1)) for start in box.offset)
            size = tuple(max(1, length + random.randint(-1, 1)) for length in box.size)
            boxes += [Piece("f", offset, size, 0)] * random.randint(0, 2)
        exact = brute_force(shape, boxes)
        assert (tiling_fault(shape, boxes) is None) == exact, (shape, boxes)
        verdicts.add(exact)
    assert verdicts == {True, False}


def test_any_box_is_read_right(tmp_path: Path) -> None:
    path = tmp_path / "step_00000000"
    values = torch.randn(7, 6, 5)
    with CheckpointWriter(path, step=0, model={}, state={}, shard_bytes=random.choice([1, 200, 1 << 20])) as writer:
        for box in random_tiling(tuple(values.shape)):
            place = tuple(slice(start, start + length) for start, length in zip(box.offset, box.size))
            writer.add("cube", values[place], shape=values.shape, offset=box.offset)
    with CheckpointReader(path) as reader:
        for _ in range(50):
            low = [random.randrange(extent) for extent in values.shape]
            size = [random.randint(1, extent - start) for start, extent in zip(low, values.shape)]
            place = tuple(slice(start, start + length) for start, length in zip(low, size))
            assert torch.equal(reader.read("cube", low, size), values[place])
        for low, size in (([0, 0, 0], [8, 1, 1]), ([-1, 0, 0], [1, 1, 1]), ([0, 0], [1, 1])):
            with pytest.raises(UserError, match="no box of size"):
                reader.read("cube", low, size)
        with pytest.raises(UserError, match="holds no exp_avg of cube"):
            reader.read_kind("exp_avg", "cube", [0, 0, 0], [1, 1, 1])


def test_a_writer_leaves_nothing_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "step_00000000"
    with (
        pytest.raises(UserError, match="hold 6 of its 12 elements"),
        CheckpointWriter(path, step=0, model={}, state={}) as writer,
    ):
        writer.add("half", torch.randn(2, 3), shape=(4, 3), offset=(0, 0))
    with pytest.raises(ZeroDivisionError), CheckpointWriter(path, step=0, model={}, state={}) as writer:
        writer.add("whole", torch.randn(math.floor(1 / 0)))
    assert list(tmp_path.iterdir()) == []
    with CheckpointWriter(path, step=0, model={}, state={}) as writer:
        writer.add("whole", torch.randn(3))
    with pytest.raises(UserError, match="exists already"):
        CheckpointWriter(path, step=0, model={}, state={})
