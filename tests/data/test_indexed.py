"""Token files: round trips, the exact bytes of the format, damage found at opening, merge, verification."""

import hashlib
import json
import multiprocessing
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalite import files
from megalite.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from megalite.data.merge import merge
from megalite.data.verify import verify
from megalite.errors import UserError
from tests.support.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.fast


def random_documents(seed: int, count: int, vocab: int = 5000, longest: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(1, longest)) for _ in range(count)]


def write(prefix, documents, dtype=np.uint16, provenance=None) -> IndexedDataset:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish(provenance)
    return IndexedDataset(prefix)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_documents_come_back(tmp_path, dtype):
    documents = random_documents(os.getpid(), 300)
    dataset = write(tmp_path / "a", documents, dtype)
    assert (len(dataset), dataset.documents, dataset.dtype) == (300, 300, np.dtype(dtype))
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(dataset[number], document)
        np.testing.assert_array_equal(dataset.document(number), document)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_index_bytes_are_the_documented_format(tmp_path):
    write(tmp_path / "a", [[7, 8, 9], [], [300]])
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 4)
    expected += struct.pack("<2i", 3, 1) + struct.pack("<2q", 0, 6) + struct.pack("<4q", 0, 1, 1, 2)
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<4H", 7, 8, 9, 300)


def test_many_documents_at_once_equal_one_by_one(tmp_path):
    documents = random_documents(3, 100)
    documents[40] = documents[99] = np.array([], np.int64)
    write(tmp_path / "one", documents)
    with IndexedWriter(tmp_path / "many", np.uint16) as writer:
        for part in (documents[:41], documents[41:]):
            writer.add_documents(np.concatenate(part), np.array([len(document) for document in part]))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"many.{suffix}").read_bytes()


@pytest.mark.parametrize("bad", [70000, -1])
def test_id_that_does_not_fit_is_refused_by_document(tmp_path, bad):
    with pytest.raises(UserError, match=rf"document 2: token id {bad} does not fit in uint16"):
        write(tmp_path / "a", [[1], [2, 3], [4, bad, 5]])
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left


def test_dtype_rule_is_megatrons():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_views_outlive_the_dataset(tmp_path):
    view = write(tmp_path / "a", [[5, 6, 7]])[0]
    np.testing.assert_array_equal(view, [5, 6, 7])


def damage(prefix, suffix, change):
    path = Path(f"{prefix}.{suffix}")
    path.write_bytes(change(path.read_bytes()))


def patched(at, value):
    return lambda data: data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("bin", lambda data: data[:-2], r"a\.bin: \d+ bytes, but its index ends at \d+"),
        ("bin", lambda data: data + b"\0\0", r"a\.bin: \d+ bytes, but its index ends at \d+"),
        ("idx", lambda data: data[:-4], r"a\.idx: \d+ bytes, but its header's 50 sequences make \d+"),
        ("idx", lambda data: data[:20], r"a\.idx: not a token index"),
        ("idx", lambda data: b"PK" + data[2:], r"a\.idx: not a token index"),
        ("idx", patched(9, struct.pack("<Q", 2)), r"a\.idx: version 2"),
        ("idx", patched(17, b"\x07"), r"a\.idx: dtype code 7"),
        ("idx", patched(18, struct.pack("<Q", 1 << 60)), r"a\.idx: \d+ bytes, but its header's 1152921504606846976"),
        ("idx", lambda data: data + bytes(50), r"a\.idx: holds multimodal modes"),
    ],
)
def test_damage_is_found_at_opening_and_named(tmp_path, suffix, change, message):
    write(tmp_path / "a", random_documents(1, 50))
    damage(tmp_path / "a", suffix, change)
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "a")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.idx: no such file"):
        IndexedDataset(tmp_path / "nothing")


def test_no_documents_at_all(tmp_path):
    dataset = write(tmp_path / "a", [])
    assert (len(dataset), dataset.documents, dataset.tokens.size) == (0, 0, 0)
    assert verify(dataset) == []


def test_merge_keeps_order_and_empty_documents(tmp_path):
    parts = [random_documents(seed, 20 + seed) for seed in range(3)]
    parts[1][5] = np.array([], np.int64)
    for number, part in enumerate(parts):
        write(tmp_path / f"part{number}", part)
    merge([tmp_path / f"part{number}" for number in (2, 0, 1)], tmp_path / "all", {"note": "merged"})
    write(tmp_path / "direct", parts[2] + parts[0] + parts[1])
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"all.{suffix}").read_bytes() == (tmp_path / f"direct.{suffix}").read_bytes()
    assert json.loads((tmp_path / "all.json").read_text())["note"] == "merged"


def test_merge_refuses_mixed_dtypes_and_its_own_input(tmp_path):
    write(tmp_path / "a", [[1]], np.uint16)
    write(tmp_path / "b", [[1]], np.int32)
    with pytest.raises(UserError, match=r"b\.idx: token dtype int32 differs from uint16"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not list(tmp_path.glob("c*"))
    with pytest.raises(UserError, match="one of the inputs"):
        merge([tmp_path / "a"], tmp_path / "a")


def test_description_has_true_checksums(tmp_path):
    description = write(tmp_path / "a", random_documents(2, 30), provenance={"tokenizer": {"kind": "T"}}).description()
    assert description["bin_sha256"] == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()
    assert description["idx_sha256"] == hashlib.sha256((tmp_path / "a.idx").read_bytes()).hexdigest()
    assert (description["documents"], description["tokenizer"]) == (30, {"kind": "T"})


def test_fingerprint_ignores_the_path_but_not_the_content(tmp_path):
    documents = random_documents(4, 40)
    first = write(tmp_path / "a", documents).fingerprint()
    (tmp_path / "elsewhere").mkdir()
    assert write(tmp_path / "elsewhere" / "b", documents).fingerprint() == first
    documents[17] = documents[17] + 1
    assert write(tmp_path / "c", documents).fingerprint() != first
    assert write(tmp_path / "d", [np.concatenate(documents[:2]), *documents[2:]]).fingerprint() != first


def test_verify_names_each_kind_of_damage(tmp_path):
    documents = random_documents(5, 50, vocab=900)
    dataset = write(tmp_path / "a", documents)
    assert verify(dataset, 900) == []
    top = int(dataset.tokens.max())
    first = next(number for number, document in enumerate(documents) if top in document)
    assert verify(dataset, top)[0].endswith(f"document {first}: token id {top} is outside the vocabulary of {top}")

    damage(tmp_path / "a", "bin", patched(10, b"\x01\x02"))
    problems = verify(IndexedDataset(tmp_path / "a"), 900)
    assert len(problems) == 2 and "a.bin: sha256" in problems[0] and "fingerprint" in problems[1]

    lengths_at, offsets_at = 34, 34 + 4 * 50
    write(tmp_path / "b", documents)
    damage(tmp_path / "b", "idx", patched(offsets_at + 8 * 7, struct.pack("<q", 2)))
    assert "sequence 7 does not begin where" in verify(IndexedDataset(tmp_path / "b"))[0]
    write(tmp_path / "c", documents)
    damage(tmp_path / "c", "idx", patched(lengths_at + 4 * 9, struct.pack("<i", -3)))
    assert "sequence 9 has length -3" in verify(IndexedDataset(tmp_path / "c"))[0]
    write(tmp_path / "d", documents)
    damage(tmp_path / "d", "idx", patched(34 + 12 * 50 + 8 * 20, struct.pack("<q", 50)))
    assert "document 20 ends before it begins" in verify(IndexedDataset(tmp_path / "d"))[0]


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        IndexedWriter(tmp_path / "file" / "a", np.uint16)


def test_crash_between_the_renames_pairs_no_old_index_with_new_tokens(tmp_path, monkeypatch):
    write(tmp_path / "a", [[1, 2], [3]])
    renamed = []

    def replace_once(source, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", [[9], [8, 7]])  # of the same sizes: opening could not tell
    with pytest.raises(UserError, match=r"a\.idx: no such file"):
        IndexedDataset(tmp_path / "a")


def _write_for_ever(prefix, started):
    with IndexedWriter(prefix, np.uint16) as writer:
        while True:
            writer.add_documents(np.arange(1 << 18) % 1000, np.full(1 << 8, 1 << 10))
            started.set()


def test_killed_writer_leaves_no_file_under_its_final_name(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_write_for_ever, args=(tmp_path / "a", started))
    process.start()
    assert started.wait(PATIENCE_SECONDS)
    process.kill()
    process.join()
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    write(tmp_path / "a", [[1, 2]])  # the next run takes over what was left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_memory_does_not_grow_with_the_documents(tmp_path):
    code = """
import resource, sys
import numpy as np
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.merge import merge
from megalite.data.verify import verify
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with IndexedWriter(sys.argv[1] + "/a", np.uint16) as writer:
    for _ in range(30):
        writer.add_documents(np.ones(200_000, np.uint16), np.full(100_000, 2))
merge([sys.argv[1] + "/a"] * 2, sys.argv[1] + "/b")
assert verify(IndexedDataset(sys.argv[1] + "/b")) == []
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
sys.exit(f'grew by {grown} KiB' if grown > 60_000 else 0)
"""
    # 9 million documents: as lists of Python numbers they take 500 MB, mapped and walked 150 MB
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), str(tmp_path / "t")))
    with pytest.raises(UserError, match="No space left"), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.zeros(1 << 21, np.uint16))
    assert list(tmp_path.iterdir()) == []
