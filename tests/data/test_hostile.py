"""Token files from anywhere: whatever bytes an index or what lies beside it holds, it is one line or it is right."""

import json
import os
import resource
import shutil
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.data import index_cache
from megalite.data.dataset import build_datasets
from megalite.data.index_cache import load_or_build
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.inspection import statistics
from megalite.data.merge import merge
from megalite.data.verify import verify
from megalite.errors import UserError

SEQUENCES = 40
LENGTHS, OFFSETS, BOUNDARIES = 34, 34 + 4 * SEQUENCES, 34 + 12 * SEQUENCES


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("hostile") / "sound"
    rng = np.random.default_rng(3)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(SEQUENCES):
            writer.add_document(rng.integers(0, 50, rng.integers(3, 30)))
    return prefix


def copy_of(sound: Path, folder: Path, patches: list[tuple[int, bytes]] = []) -> str:  # noqa: B006
    for part in ("bin", "idx", "json"):
        shutil.copy(f"{sound}.{part}", folder / f"x.{part}")
    index = bytearray((folder / "x.idx").read_bytes())
    for where, data in patches:
        index[where : where + len(data)] = data
    (folder / "x.idx").write_bytes(index)
    return str(folder / "x")


def use(prefix: str, folder: Path) -> None:
    """Everything that reads a token file, one after the other; each may refuse, and none does anything else."""

    def train() -> None:
        config = SimpleNamespace(train=[prefix], valid=[], split=[])
        data = build_datasets(config, seq_length=8, seed=1, train_samples=60, valid_samples=0, vocab_size=50)[0]
        for number in range(80):
            data[number]

    def look() -> None:
        dataset = IndexedDataset(prefix)
        statistics(dataset)
        for number in range(dataset.documents):
            dataset.document(number)

    for work in (train, look, lambda: verify(IndexedDataset(prefix)), lambda: merge([prefix], folder / "m")):
        try:
            work()
        except UserError as error:
            assert "\n" not in str(error)


WILD = st.sampled_from([0, 1, 2, 3, -1, 7, SEQUENCES, SEQUENCES + 1, 2**31 - 1, -(2**31), 2**62, -(2**62), 2**63 - 1])
PATCH = st.one_of(
    st.tuples(st.integers(0, 33), st.binary(min_size=1, max_size=8)),
    st.tuples(st.integers(0, BOUNDARIES + 8 * SEQUENCES), st.binary(min_size=1, max_size=4)),
    st.tuples(st.integers(0, SEQUENCES - 1), WILD).map(
        lambda at: (LENGTHS + 4 * at[0], struct.pack("<q", at[1])[:4])
    ),
    st.tuples(st.integers(0, SEQUENCES - 1), WILD).map(lambda at: (OFFSETS + 8 * at[0], struct.pack("<q", at[1]))),
    st.tuples(st.integers(0, SEQUENCES), WILD).map(lambda at: (BOUNDARIES + 8 * at[0], struct.pack("<q", at[1]))),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patches=st.lists(PATCH, min_size=1, max_size=3))
def test_any_index_is_refused_in_one_line_or_read(
    sound: Path, tmp_path: Path, patches: list[tuple[int, bytes]]
) -> None:
    use(copy_of(sound, tmp_path, patches), tmp_path)


@pytest.mark.fast
def test_numbers_that_would_mislead_are_refused(sound: Path, tmp_path: Path) -> None:
    """Lengths of 2^31 - 1 made billions of samples, and an odd offset read halves of two tokens as one."""
    lengths = [(LENGTHS + 4 * number, struct.pack("<i", 2**31 - 1)) for number in range(SEQUENCES - 1)]
    config = SimpleNamespace(train=[copy_of(sound, tmp_path, lengths)], valid=[], split=[])
    with pytest.raises(UserError, match=r"x\.idx: its sequences have \d{11} tokens, but the .bin has \d{3}"):
        build_datasets(config, seq_length=8, seed=1, train_samples=60, valid_samples=0)
    copy_of(sound, tmp_path, [(OFFSETS + 8 * 5, struct.pack("<q", 3))])
    with pytest.raises(UserError, match="sequence 5 lies outside the file or between two tokens"):
        IndexedDataset(config.train[0])[5]
    data = build_datasets(config, seq_length=8, seed=1, train_samples=60, valid_samples=0)[0]
    with pytest.raises(UserError, match=r"x\.idx: sequence 5 begins between two tokens; the file is damaged"):
        [data[number] for number in range(60)]
    with pytest.raises(UserError, match="sequence 5 does not begin where the one before it ends"):
        merge([config.train[0]], tmp_path / "m")
    copy_of(sound, tmp_path, [(BOUNDARIES + 8, struct.pack("<qq", 2**63 - 1, -(2**63)))])
    assert "ends before it begins" in verify(IndexedDataset(config.train[0]))[0]  # the difference overflows to 1


@pytest.mark.fast
@pytest.mark.parametrize("part", ["bin", "idx", "json"])
def test_what_is_no_plain_file_is_refused_and_not_waited_for(sound: Path, tmp_path: Path, part: str) -> None:
    prefix = copy_of(sound, tmp_path)
    for make in (
        os.mkfifo,
        lambda path: os.symlink("/dev/zero", path),
        lambda path: os.symlink(path, path),
        os.mkdir,
    ):
        (tmp_path / f"x.{part}").unlink() if not (tmp_path / f"x.{part}").is_dir() else None
        make(tmp_path / f"x.{part}")
        with pytest.raises(UserError, match=rf"x\.{part}'?: "):
            IndexedDataset(prefix).description()
    with pytest.raises(UserError, match="cannot be read"):
        IndexedDataset("a\0b")


@pytest.mark.fast
@pytest.mark.parametrize(
    "description",
    [b"[1]", b"{", b"[" * 100_000, b'{"tokenizer": 5}', b'{"tokenizer": {"files": [5]}}', b'{"merged_from": [5]}',
     b'{"fingerprint": 5}', b'{"tokenizer": {"sha256": 5}}', b"\xff", b'{"tokenizer": {"vocab_size": "x"}}'],
)  # fmt: skip
def test_a_description_of_other_kinds_is_one_line(sound: Path, tmp_path: Path, description: bytes) -> None:
    prefix = copy_of(sound, tmp_path)
    (tmp_path / "x.json").write_bytes(description)
    with pytest.raises(UserError, match=r"x\.json: not ") as caught:
        IndexedDataset(prefix).description()
    assert "\n" not in str(caught.value)


@pytest.mark.fast
def test_index_arrays_are_mapped_without_parsing_and_rebuilt_when_damaged(tmp_path: Path, monkeypatch) -> None:
    """`np.load` parses the header as Python, which several threads may not do at once."""
    arrays = {"a": np.arange(6, dtype=np.int32).reshape(3, 2), "b": np.zeros(0, np.uint32), "c": np.arange(3)}
    monkeypatch.setattr(np, "load", None)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(load_or_build(tmp_path, "key", lambda: arrays))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all((one[name] == arrays[name]).all() for one in found for name in arrays)
    assert all(one[name].dtype == arrays[name].dtype for one in found for name in arrays)
    folder = tmp_path / "key"
    for name, content in (
        ("arrays.json", b'{"a": ["object", [3, 2]]}'),
        ("arrays.json", b"[" * 9999),
        ("arrays.json", json.dumps({"../../a": ["int32", [1]]}).encode()),
        ("arrays.json", b'{"a": ["int32", [-3, 2]]}'),
        ("a.npy", b"\x93NUMPY\x01\x00\xff\xff"),
        ("c.npy", b""),
    ):
        (folder / name).write_bytes(content)
        assert (load_or_build(tmp_path, "key", lambda: arrays)["c"] == arrays["c"]).all(), name


@pytest.mark.fast
def test_every_refused_write_is_one_line_without_remains(sound: Path, tmp_path: Path) -> None:
    """A file-size limit, as a full disk: merged token files and sample indices."""
    arrays = {"a": np.zeros(1 << 16)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for work, path in (
            (lambda: merge([sound], tmp_path / "m"), "m.idx"),
            (lambda: load_or_build(tmp_path / "cache", "key", lambda: arrays), "cache/key"),
        ):
            with pytest.raises(UserError, match=f"{path} cannot be written: "):
                work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cache", "key.lock"]


@pytest.mark.fast
def test_a_file_system_without_locks_builds_each_its_own(tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(path: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(index_cache, "locked", refuse)
    assert load_or_build(tmp_path, "key", lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    assert "building the data index unlocked" in caplog.text
