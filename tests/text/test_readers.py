import gzip
import itertools
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megalite.errors import UserError
from megalite.text import readers
from megalite.text.input_files import expand_inputs
from megalite.text.readers import read_documents
from megalite.text.records import BadRecord

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
GOOD = b'{"text": "good"}'

# One line of a .jsonl file among good ones: what becomes of it, and what the message must say
BAD_LINES = {
    "invalid UTF-8 byte": (b'{"text": "a\xffb"}', readers.INVALID_UTF8, "0xff at 11"),
    "broken JSON": (b'{"text": "a', readers.BROKEN_JSON, ""),
    "missing key": (b'{"body": "a", "url": 1}', readers.MISSING_KEY, "'body', 'url'"),
    "no fields at all": (b"{}", readers.MISSING_KEY, "none"),
    "empty text": (b'{"text": ""}', readers.EMPTY, ""),
    "text is a number": (b'{"text": 5}', readers.NOT_TEXT, "number"),
    "text is null": (b'{"text": null}', readers.NOT_TEXT, "null"),
    "text is an object": (b'{"text": {"a": 1}}', readers.NOT_TEXT, "object"),
    "line is a list": (b"[1, 2]", readers.NOT_AN_OBJECT, "list"),
    "line is null": (b"null", readers.NOT_AN_OBJECT, "null"),
    "lone surrogate": (b'{"text": "\\ud800"}', readers.LONE_SURROGATE, ""),
    "lone surrogate elsewhere": (b'{"text": "a", "id": "\\udc00"}', readers.LONE_SURROGATE, ""),
    "deep nesting": (b'{"text": ' + b"[" * 5000, readers.BROKEN_JSON, ""),
}
KEPT_LINES = {
    "NUL character": (b'{"text": "a\\u0000b"}', "a\0b"),
    "CRLF": (b'{"text": "a"}\r', "a"),
    "lone CR": (b'{"text": "a\\rb"}', "a\rb"),
    "NEL and line separator": ('{"text": "a\x85\u2028b"}'.encode(), "a\x85\u2028b"),
    "NaN elsewhere": (b'{"text": "a", "score": NaN}', "a"),
    "surrogate pair": (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"),
    "same key twice": (b'{"text": "a", "text": "b"}', "b"),
}


def read(path: Path, **options) -> tuple[list[tuple[int, str]], list[BadRecord]]:
    bad: list[BadRecord] = []
    documents = [(document.line, document.text) for document in read_documents(path, on_bad=bad.append, **options)]
    return documents, bad


@pytest.mark.fast
@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_costs_itself_alone(tmp_path: Path, case: str, packed: str) -> None:
    line, reason, words = BAD_LINES[case]
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(PACK[packed](b"\n".join([GOOD, GOOD, line, GOOD])))
    documents, bad = read(path)
    assert documents == [(1, "good"), (2, "good"), (4, "good")]
    assert [(record.line, record.reason, record.path) for record in bad] == [(3, reason, path)]
    assert words in bad[0].detail
    with pytest.raises(UserError, match=rf"a\.jsonl{packed}:3: {reason}"):
        list(read_documents(path))


@pytest.mark.fast
@pytest.mark.parametrize("case", KEPT_LINES)
def test_odd_line_is_kept(tmp_path: Path, case: str) -> None:
    line, text = KEPT_LINES[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, b"  ", GOOD, b""]))
    assert read(path) == ([(1, "good"), (3, text), (5, "good")], [])


@pytest.mark.parametrize("packed", PACK)
def test_byte_order_mark_is_no_text(tmp_path: Path, packed: str) -> None:
    for name, content in (("a.jsonl", GOOD), ("a.txt", b"good")):
        path = tmp_path / (name + packed)
        path.write_bytes(PACK[packed](b"\xef\xbb\xbf" + content))
        assert read(path) == ([(1, "good")], [])


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_truncated_file_keeps_what_was_read(tmp_path: Path, packed: str, chance: random.Random) -> None:
    lines = [json.dumps({"text": f"{number} {chance.random()}"}) for number in range(20000)]
    data = PACK[packed]("\n".join(lines).encode())
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(data[: len(data) * 9 // 10])
    documents, bad = read(path)
    assert 10000 < len(documents) < 20000
    assert [text for _, text in documents] == [json.loads(line)["text"] for line in lines[: len(documents)]]
    assert [(record.reason, record.line) for record in bad] == [(readers.DAMAGED, len(documents) + 1)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.parquet.gz", "a.txt.gz"])
def test_wrong_content_is_damage_and_no_crash(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is nothing of the kind\n" * 50)
    documents, bad = read(tmp_path / name)
    assert documents == [] and [record.reason for record in bad] == [readers.DAMAGED]


def test_concatenated_members_are_one_file(tmp_path: Path) -> None:
    for packed in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(b"".join(PACK[packed](b'{"text": "%d"}\n' % number) for number in range(3)))
        assert [text for _, text in read(path)[0]] == ["0", "1", "2"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD) + bytes(1000))
    assert read(tmp_path / "a.jsonl.gz") == ([(1, "good")], [])  # padding, as tape archives have


@pytest.mark.fast
def test_ranges_that_tile_a_file_give_each_document_once(tmp_path: Path, chance: random.Random) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * chance.randrange(1, 40) + str(n)}) for n in range(chance.randrange(1, 60))]
    path.write_text("\n".join(lines) + chance.choice(["", "\n"]))
    size = path.stat().st_size
    whole = [text for _, text in read(path)[0]]
    assert whole == [json.loads(line)["text"] for line in lines]
    for width in [*range(1, 20), *(chance.randrange(1, size + 2) for _ in range(20))]:
        parts = [read(path, byte_range=(start, start + width))[0] for start in range(0, size, width)]
        assert [text for part in parts for _, text in part] == whole


def test_parquet_rows_columns_and_ranges(tmp_path: Path, chance: random.Random) -> None:
    texts = [chance.choice(["", None, f"text {number}"]) for number in range(100)]
    table = pyarrow.table({"id": list(range(100)), "text": texts})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=chance.randrange(1, 40))
    good = [(number + 1, text) for number, text in enumerate(texts) if text]
    documents, bad = read(path)
    assert documents == good
    assert [record.reason for record in bad] == [
        readers.EMPTY if text == "" else readers.NOT_TEXT for text in texts if not text
    ]
    cuts = sorted(chance.randrange(path.stat().st_size) for _ in range(5))
    cuts = [0, *cuts, path.stat().st_size]
    parts = [read(path, byte_range=span)[0] for span in itertools.pairwise(cuts)]
    assert [text for part in parts for _, text in part] == [text for _, text in good]
    assert [document.extra["id"] + 1 for document in read_documents(path, on_bad=bad.append)] == [n for n, _ in good]
    (tmp_path / "a.parquet.zst").write_bytes(zstandard.compress(path.read_bytes()))
    assert read(tmp_path / "a.parquet.zst")[0] == good
    _, bad = read(path, key="body")
    assert bad[0].reason == readers.MISSING_KEY and "'id', 'text'" in bad[0].detail


def test_parquet_with_invalid_utf8_loses_that_row(tmp_path: Path) -> None:
    column = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    documents, bad = read(tmp_path / "a.parquet")
    assert documents == [(1, "a"), (3, "c")]
    assert [(record.line, record.reason) for record in bad] == [(2, readers.INVALID_UTF8)]


@pytest.mark.parametrize("packed", PACK)
def test_other_names_are_text_unless_binary(tmp_path: Path, packed: str) -> None:
    for name, content, texts, reason in [
        ("a.py", b"x = 1\r\n", ["x = 1\r\n"], None),
        ("README", "é\n".encode(), ["é\n"], None),
        ("a.png", b"\x89PNG\0", [], readers.BINARY),
        ("a.c", b"\xff", [], readers.INVALID_UTF8),
        ("a.txt", b"a\0b", ["a\0b"], None),
        ("b.txt", b"", [], readers.EMPTY),
    ]:
        path = tmp_path / (name + packed)
        path.write_bytes(PACK[packed](content))
        documents, bad = read(path)
        assert [text for _, text in documents] == texts, name
        assert [record.reason for record in bad] == ([reason] if reason else []), name


@pytest.mark.fast
def test_inputs_are_expanded_once_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "odd[1].txt"):
        (tmp_path / name).write_text(name)
    names = [path.relative_to(tmp_path).as_posix() for path in expand_inputs([f"{tmp_path}/**/*.txt"])]
    assert names == ["a.txt", "b.txt", "odd[1].txt", "sub/c.txt"]
    assert expand_inputs([tmp_path / "b.txt", f"{tmp_path}/*.txt"])[:2] == [tmp_path / "b.txt", tmp_path / "a.txt"]
    assert expand_inputs([tmp_path / "odd[1].txt"]) == [tmp_path / "odd[1].txt"]
    assert len(expand_inputs([tmp_path])) == 4
    with pytest.raises(UserError, match=r"nothing\*.jsonl: matches no file"):
        expand_inputs([tmp_path / "b.txt", f"{tmp_path}/nothing*.jsonl"])


def test_web_archive_gives_main_text(tmp_path: Path) -> None:
    pytest.importorskip("fastwarc")
    pytest.importorskip("resiliparse")

    def response(url: str, body: bytes, kind: str) -> bytes:
        http = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (kind.encode(), len(body)) + body
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Record-ID: <urn:uuid:{url}>\r\n"
        return (
            f"{head}Content-Type: application/http\r\nContent-Length: {len(http)}\r\n\r\n".encode() + http + b"\r\n\r\n"
        )

    page = "<html><body><nav><a>Menu</a></nav><main><p>Grüße from the main text of this page.</p></main></body></html>"
    data = response("u:1", page.encode("latin-1"), "text/html; charset=iso-8859-1") + response("u:2", b"P", "image/png")
    data += response("u:3", page.encode(), "text/html; charset=utf-8")
    for name, content in (
        ("a.warc", data),
        ("a.warc.gz", gzip.compress(data)),
        ("a.warc.zst", zstandard.compress(data)),
    ):
        (tmp_path / name).write_bytes(content)
        documents, bad = read(tmp_path / name)
        assert documents == [(1, "Grüße from the main text of this page."), (3, documents[0][1])] and not bad
    (tmp_path / "a.warc").write_bytes(data[:-50])
    documents, bad = read(tmp_path / "a.warc")
    assert len(documents) == 1 and bad[0].reason == readers.DAMAGED
