"""What a file holds is told by its first bytes; a record has a size limit; and no bytes at all end in a traceback."""

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.errors import UserError
from megalite.text import records
from megalite.text.readers import read_documents
from tests.text.test_readers import PACK, read

LINES = b'{"text": "one"}\n{"text": "two"}\n'
ARRAY = json.dumps([{"text": "one"}, {"text": "two"}]).encode()
PRETTY = json.dumps([{"text": "one"}, {"text": "two"}], indent=1).encode()
OBJECT = json.dumps({"text": "one", "id": [1]}, indent=2).encode()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("table") / "t"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), path)
    return path.read_bytes()


@pytest.mark.fast
@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(
    "name", ["part-00000", "a.jsonl", "a.json", "a.jsonl.1", "a.parquet", "blob.gz", "a.jsonl.gz", "a.jsonl.zst"]
)
def test_json_lines_are_read_whatever_the_name(tmp_path: Path, name: str, packed: str) -> None:
    """Packed or not, too, whatever the name says of that."""
    (tmp_path / name).write_bytes(PACK[packed](LINES))
    assert read(tmp_path / name) == ([(1, "one"), (2, "two")], [])


@pytest.mark.fast
@pytest.mark.parametrize("name", ["part-00000", "a.jsonl", "a.txt", "a.bin", "a.parquet.gz"])
def test_a_table_is_read_whatever_the_name(tmp_path: Path, table: bytes, name: str) -> None:
    for packed in PACK:
        (tmp_path / name).write_bytes(PACK[packed](table))
        assert read(tmp_path / name) == ([(1, "one"), (2, "two")], []), packed


@pytest.mark.fast
@pytest.mark.parametrize("name", ["part-00000", "a.json", "a.jsonl.gz"])
def test_a_json_array_is_its_records(tmp_path: Path, name: str) -> None:
    for content, texts in ((ARRAY, ["one", "two"]), (PRETTY, ["one", "two"]), (OBJECT, ["one"]), (b"[]", [])):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        documents, bad = read(tmp_path / name)
        assert ([text for _, text in documents], bad) == (texts, []), content
    (tmp_path / "mixed.json").write_bytes(b'[{"text": "one"}, 2, {"body": "x"}]')
    documents, bad = read(tmp_path / "mixed.json")
    assert documents == [(1, "one")]
    assert [(row.line, row.reason) for row in bad] == [(2, records.NOT_AN_OBJECT), (3, records.MISSING_KEY)]


@pytest.mark.fast
def test_a_broken_first_line_costs_itself_alone(tmp_path: Path) -> None:
    for first in (b'{"text": "a', b"[1, 2]", b"[", b"{"):
        (tmp_path / "a.jsonl").write_bytes(first + b"\n" + LINES)
        documents, bad = read(tmp_path / "a.jsonl")
        assert documents == [(2, "one"), (3, "two")] and [row.line for row in bad] == [1], first


@pytest.mark.fast
def test_what_looks_like_json_but_is_source_code_stays_one_text(tmp_path: Path) -> None:
    for name, content in (
        ("notebook.ipynb", OBJECT),
        ("min.map", b'{"version": 3, "sources": []}\n'),
        ("README", b"[![badge](x)](y)\n{}\n"),
        ("one.txt", b'{"text": "one"}\n'),
        ("cut.txt", b"[{"),
    ):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == ([(1, content.decode())], []), name


@pytest.mark.fast
def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    for name, content, reason, words in (
        ("a.jsonl.bz2", b"BZh91AY&SY\x01\x02", records.BINARY, "bzip2 data, which is not read"),
        ("a.jsonl", b"\xfd7zXZ\0\0", records.BINARY, "xz data"),
        ("b.jsonl.gz", gzip.compress(gzip.compress(LINES)), records.BINARY, "compressed twice"),
        ("a.txt", LINES, records.MISNAMED, "call it .jsonl"),
    ):
        (tmp_path / name).write_bytes(content)
        documents, bad = read(tmp_path / name)
        assert documents == [] and [row.reason for row in bad] == [reason] and words in bad[0].detail, name


@pytest.mark.fast
@pytest.mark.parametrize("packed", PACK)
def test_a_record_that_is_too_long_costs_itself_alone(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(PACK[packed](b'{"text": "one"}\n{"text": "%s"}\n{"text": "two"}\n' % (b"x" * 100)))
    documents, bad = read(path, max_record_bytes=50)
    assert documents == [(1, "one"), (3, "two")]
    assert [(row.line, row.reason) for row in bad] == [(2, records.TOO_LONG)] and "--max-record-bytes" in bad[0].detail
    for name, content in (("b.txt", b"x" * 60), ("c.json", PRETTY)):
        (tmp_path / (name + packed)).write_bytes(PACK[packed](content))
        documents, bad = read(tmp_path / (name + packed), max_record_bytes=len(content) - 1)
        assert documents == [] and [row.reason for row in bad] == [records.TOO_LONG], name


@pytest.mark.fast
def test_ranges_agree_on_a_line_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "%s"}\n{"text": "two"}' % (b"x" * 100))
    size = path.stat().st_size
    for width in range(1, size + 2):
        parts = [read(path, byte_range=(at, at + width), max_record_bytes=50) for at in range(0, size, width)]
        assert [text for documents, _ in parts for _, text in documents] == ["one", "two"], width
        assert [row.reason for _, bad in parts for row in bad] == [records.TOO_LONG], width


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_giant_line_in_a_small_file_is_counted_in_bounded_memory(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"bomb.jsonl{packed}"
    gigabyte = [b"x" * (1 << 20)] * 1024
    if packed == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(b'{"text": "')
            file.writelines(gigabyte)
            file.write(b'"}\n' + LINES)
    else:
        with open(path, "wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
            for part in (b'{"text": "', *gigabyte, b'"}\n', LINES):
                file.write(part)
    code = (
        "import sys; from megalite.text.readers import read_documents; bad = []\n"
        "print([d.text for d in read_documents(sys.argv[1], on_bad=bad.append, max_record_bytes=1 << 20)], *bad)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20)),
    )
    assert "['one', 'two']" in done.stdout and "record too long: a line of 1,073,741,8" in done.stdout, done.stderr


FRAGMENTS = st.sampled_from(
    [b'{"text": "a"}\n', b'{"text": "', b"[", b"{", b"]", b"\n", b"\xff", b"\0", b"PAR1", b"WARC/1.0\r\n",
     b"BZh91AY&SY", b'{"text": 1e999999}\n', b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", b"[" * 2000,
     b'{"a":' * 2000, gzip.compress(LINES), zstandard.compress(LINES), b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd\xff", ARRAY]
)  # fmt: skip
NAMES = st.sampled_from(["a", "a.jsonl", "a.json", "a.txt", "a.parquet", "a.py", "a.jsonl.gz", "a.zst", "a.parquet.gz"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, parts=st.lists(st.one_of(FRAGMENTS, st.binary(max_size=40)), max_size=8), packed=st.booleans())
def test_any_bytes_are_documents_or_bad_records(tmp_path: Path, name: str, parts: list[bytes], packed: bool) -> None:
    content = b"".join(parts)
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    bad: list[records.BadRecord] = []
    try:
        texts = [document.text for document in read_documents(tmp_path / name, on_bad=bad.append)]
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(texts) and all("\n" not in str(row) for row in bad)
