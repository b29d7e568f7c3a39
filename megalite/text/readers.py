"""Documents from `.jsonl`, `.txt`, `.parquet`, `.warc` and plain text of any other name, each plain, `.gz` or `.zst`.

Files are read as bytes and decoded record by record, so one bad byte costs one record and never the file. Whatever
cannot be used is handed to the caller as a `BadRecord` with its file, line and reason; nothing is dropped in silence.

A byte range [start, end) of an uncompressed `.jsonl` or `.parquet` file means the lines (row groups) that *begin* in
it, so ranges that tile a file give every document exactly once, and processes need no parent that feeds them.
"""

import glob
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import orjson
import zstandard

from megalite.errors import UserError

READ_BYTES = 1 << 20
COMPRESSED_READ_BYTES = 1 << 16
PARQUET_ROWS = 256
UTF8_BOM = b"\xef\xbb\xbf"
COMPRESSIONS = (".gz", ".zst")
JSON_LINES = (".jsonl", ".ndjson", ".json")

# Reasons why a record (or the rest of a file) cannot be used
INVALID_UTF8 = "invalid UTF-8"
BROKEN_JSON = "broken JSON"
NOT_AN_OBJECT = "not a JSON object"
MISSING_KEY = "missing key"
NOT_TEXT = "not text"
EMPTY = "empty text"
LONE_SURROGATE = "lone surrogate"
BINARY = "binary file"
DAMAGED = "damaged file"


@dataclass(slots=True)
class Document:
    """One text with the line (from 1; rows of a table) it begins at, and the record's other fields."""

    text: str
    line: int
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class BadRecord:
    """A record that gives no document: where, why (one of the reasons above), in words, and its bytes where known."""

    path: Path
    line: int
    reason: str
    detail: str
    raw: bytes = b""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}: {self.detail}"


@dataclass(slots=True)
class ReadCounter:
    """How far a reader is: bytes of the file (compressed ones where it is) and lines, rows or files seen."""

    bytes: int = 0
    lines: int = 0


OnBad = Callable[[BadRecord], None]


class _Damaged(Exception):
    """The file ends too early or its compression is broken."""


def expand_inputs(patterns: Sequence[str | Path]) -> list[Path]:
    """The files that names, globs (`**` too) and directories (all below, hidden ones apart) stand for, each once.

    The order is that of the patterns, sorted within each, and so does not depend on the file system.

    Raises:
        UserError: a pattern matches no file, or a file cannot be read.
    """
    files: dict[Path, None] = {}
    for pattern in map(str, patterns):
        matches = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        if os.path.isdir(pattern):
            matches = sorted(glob.glob(os.path.join(glob.escape(pattern), "**"), recursive=True))
        found = [Path(match) for match in matches if os.path.isfile(match)]
        if not found:
            what = "is a directory without files" if os.path.isdir(pattern) else "matches no file"
            raise UserError(f"--input {pattern}: {what}; give files, directories or globs such as 'corpus/*.jsonl.gz'")
        files.update(dict.fromkeys(found))
    for path in files:
        if not os.access(path, os.R_OK):
            raise UserError(f"--input {path}: cannot be read (permission denied); change its mode or leave it out")
    return list(files)


def file_format(path: Path) -> tuple[str, str]:
    """What a file's name says: (`jsonl`, `parquet`, `warc`, `text` or `unknown`, and `.gz`, `.zst` or nothing)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind in JSON_LINES:
        return "jsonl", compression
    return {".parquet": "parquet", ".warc": "warc", ".txt": "text"}.get(kind, "unknown"), compression


def can_split(path: Path) -> bool:
    """Whether byte ranges of this file can be read apart."""
    kind, compression = file_format(path)
    return kind in ("jsonl", "parquet") and not compression


def read_documents(
    path: str | Path,
    key: str = "text",
    byte_range: tuple[int, int] | None = None,
    on_bad: OnBad | None = None,
    counter: ReadCounter | None = None,
    with_extra: bool = True,
) -> Iterator[Document]:
    """The documents of one file, in order, in bounded memory (one record at a time).

    Args:
        path: its name says the format; a name with an unknown ending is one text document, as `.txt` is.
        key: the field or column that holds the text.
        byte_range: only the records that begin in [start, end); lines then count from the first of them.
        on_bad: gets every record that cannot be used; without it the first one raises.
        counter: is kept up to date while reading.
        with_extra: whether documents carry the record's other fields (a table's other columns are not read without).

    Raises:
        UserError: the file cannot be opened, or a bad record and no `on_bad`.
    """
    path = Path(path)
    on_bad = on_bad or _refuse
    counter = counter if counter is not None else ReadCounter()
    kind, compression = file_format(path)
    if byte_range is not None and not can_split(path):
        if byte_range[0] > 0:
            return  # the file is one piece, which begins at byte 0
        byte_range = None
    try:
        if kind == "jsonl":
            documents = _json_lines(path, compression, key, byte_range, on_bad, counter)
        elif kind == "parquet":
            documents = _parquet(path, compression, key, byte_range, on_bad, counter, with_extra)
        elif kind == "warc":
            from megalite.text.warc import read_warc

            documents = read_warc(path, on_bad, counter)
        else:
            documents = _text_file(path, compression, kind == "unknown", on_bad, counter)
        for document in documents:
            if document.text:
                yield document
            else:
                on_bad(BadRecord(path, document.line, EMPTY, "the text has no characters"))
    except _Damaged as damage:
        on_bad(BadRecord(path, counter.lines + 1, DAMAGED, str(damage)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _refuse(record: BadRecord) -> NoReturn:
    raise UserError(f"{record}; mend or remove the record")


# ---- bytes


def _blocks(path: Path, compression: str, counter: ReadCounter) -> Iterator[bytes]:
    """The decompressed content, in order; raises `_Damaged` after what could be read of a truncated file."""
    with open(path, "rb") as file:
        if not compression:
            while block := file.read(READ_BYTES):
                counter.bytes += len(block)
                yield block
            return
        unpack = _new_decompressor(compression)
        started = False  # whether a member or frame is open: then the end of the file is too early
        while block := file.read(COMPRESSED_READ_BYTES):
            counter.bytes += len(block)
            while block:
                if not started and not block.strip(b"\0"):
                    break  # zero padding between or after members
                try:
                    data = unpack.decompress(block)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise _Damaged(f"broken {compression} data ({error}); what came before it was kept") from error
                started, block = True, b""
                if data:
                    yield data
                if unpack.eof:
                    started, block, unpack = False, unpack.unused_data, _new_decompressor(compression)
        if started:
            raise _Damaged(f"the {compression} data end too early; what came before was kept")


def _new_decompressor(compression: str) -> Any:
    if compression == ".gz":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their "\\n"; only that byte ends a line, so a lone CR or U+2028 does not cut a record."""
    pending: list[bytes] = []
    for block in blocks:
        first, *rest = block.split(b"\n")
        pending.append(first)
        if rest:
            yield b"".join(pending)
            yield from rest[:-1]
            pending = [rest[-1]]
    if last := b"".join(pending):
        yield last


def _lines_in_range(path: Path, start: int, end: int, counter: ReadCounter) -> Iterator[bytes]:
    """The lines whose first byte lies in [start, end), without their "\\n"."""
    with open(path, "rb", buffering=READ_BYTES) as file:
        position = start
        if start > 0:
            file.seek(start - 1)
            position += len(file.readline()) - 1  # to the first line that begins at or after `start`
        for line in file:
            if position >= end:
                return
            position += len(line)
            counter.bytes = position - start
            yield line.removesuffix(b"\n")


# ---- formats


def _json_lines(
    path: Path, compression: str, key: str, byte_range: tuple[int, int] | None, on_bad: OnBad, counter: ReadCounter
) -> Iterator[Document]:
    if byte_range is None:
        lines = _lines(_blocks(path, compression, counter))
    else:
        lines = _lines_in_range(path, *byte_range, counter)
    at_file_start = byte_range is None or byte_range[0] == 0
    for line in lines:
        counter.lines += 1
        if counter.lines == 1 and at_file_start:
            line = line.removeprefix(UTF8_BOM)
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if not line.strip():
                continue  # a blank line is no record
            record = _second_opinion(path, counter.lines, line, str(error), on_bad)
            if record is None:
                continue
        if type(record) is not dict:
            detail = f"the line holds a JSON {_json_type(record)}, not an object with a field {key!r}"
            on_bad(BadRecord(path, counter.lines, NOT_AN_OBJECT, detail, line))
            continue
        document = _from_record(path, counter.lines, record, key, line, on_bad)
        if document is not None:
            yield document


def _second_opinion(path: Path, line: int, raw: bytes, error: str, on_bad: OnBad) -> Any:
    """Why orjson refused the line; the record itself where that was only a NaN, which Python's own parser takes."""
    try:
        record = json.loads(raw.decode())
        orjson.dumps(record)  # refuses what cannot be UTF-8
        return record
    except UnicodeDecodeError as decoding:
        detail = f"byte 0x{raw[decoding.start]:02x} at {decoding.start} of the line ({decoding.reason})"
        on_bad(BadRecord(path, line, INVALID_UTF8, detail, raw))
    except RecursionError:
        on_bad(BadRecord(path, line, BROKEN_JSON, "nested too deeply", raw))
    except ValueError:
        on_bad(BadRecord(path, line, BROKEN_JSON, error, raw))
    except TypeError:
        on_bad(BadRecord(path, line, LONE_SURROGATE, "a string holds half of a surrogate pair", raw))
    return None


def _json_type(value: object) -> str:
    return {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}.get(type(value), "null")


def _from_record(path: Path, line: int, record: dict[str, Any], key: str, raw: bytes, on_bad: OnBad) -> Document | None:
    text = record.pop(key, record)  # the record itself stands for "not there"
    if type(text) is str:
        return Document(text, line, record)
    if text is record:
        keys = ", ".join(map(repr, record)) or "none"
        on_bad(BadRecord(path, line, MISSING_KEY, f"no field {key!r}; fields there: {keys}", raw))
    else:
        kind = _json_type(text) if not isinstance(text, dict) else "object"
        on_bad(BadRecord(path, line, NOT_TEXT, f"field {key!r} holds a {kind}, not a string", raw))
    return None


def _text_file(
    path: Path, compression: str, check_binary: bool, on_bad: OnBad, counter: ReadCounter
) -> Iterator[Document]:
    """The whole file as one document, exactly as it stands but for a byte order mark."""
    blocks: list[bytes] = []
    damage: _Damaged | None = None
    try:
        for block in _blocks(path, compression, counter):
            if check_binary and not blocks and b"\0" in block:
                on_bad(
                    BadRecord(path, 1, BINARY, f"NUL bytes in a file whose name ({path.suffix}) says no known format")
                )
                return
            blocks.append(block)
    except _Damaged as error:
        damage = error
    raw = b"".join(blocks).removeprefix(UTF8_BOM)
    counter.lines += 1
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        cut_character = damage is not None and len(raw) - error.start < 4  # truncation may halve the last character
        if not cut_character:
            detail = f"byte 0x{raw[error.start]:02x} at {error.start} of the file ({error.reason})"
            on_bad(BadRecord(path, line, INVALID_UTF8, detail))
            text = ""
        else:
            text = raw[: error.start].decode()
        if not text:
            return
    if text or damage is None:
        yield Document(text, 1)
    if damage is not None:
        raise damage


def _parquet(
    path: Path,
    compression: str,
    key: str,
    byte_range: tuple[int, int] | None,
    on_bad: OnBad,
    counter: ReadCounter,
    with_extra: bool,
) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    with _seekable(path, compression, counter) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if key not in names:
                detail = f"no column {key!r}; columns there: {', '.join(map(repr, names))}"
                counter.lines += table.metadata.num_rows
                on_bad(BadRecord(path, 1, MISSING_KEY, detail))
                return
            groups = [
                group
                for group in range(table.num_row_groups)
                if byte_range is None or byte_range[0] <= _group_offset(table, group) < byte_range[1]
            ]
            columns = None if with_extra else [key]
            for batch in table.iter_batches(PARQUET_ROWS, groups, columns):
                yield from _rows(path, batch, key, on_bad, counter)
        except pyarrow.ArrowException as error:
            raise _Damaged(f"not readable as parquet ({str(error).splitlines()[0]})") from error
        start, end = byte_range or (0, path.stat().st_size)
        counter.bytes = end - start


def _seekable(path: Path, compression: str, counter: ReadCounter) -> IO[bytes]:
    """The file itself, or its decompressed copy in a temporary file: a parquet file's directory stands at its end."""
    if not compression:
        return open(path, "rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        for block in _blocks(path, compression, counter):
            copy.write(block)
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return copy


def _group_offset(table: Any, group: int) -> int:
    """First byte of a row group in its file."""
    column = table.metadata.row_group(group).column(0)
    return min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)


def _rows(path: Path, batch: Any, key: str, on_bad: OnBad, counter: ReadCounter) -> Iterator[Document]:
    column = batch.column(batch.schema.get_field_index(key))
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [None] * len(batch)  # one bad string spoils the fast way for its batch only
    for index, row in enumerate(rows):
        counter.lines += 1
        if row is None:
            try:
                row = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
            except UnicodeDecodeError as error:
                detail = f"byte 0x{error.object[error.start]:02x} at {error.start} of the row's text"
                on_bad(BadRecord(path, counter.lines, INVALID_UTF8, detail))
                continue
        if row[key] is None or type(row[key]) is str:
            document = _from_record(path, counter.lines, row, key, b"", on_bad)
            if document is not None:
                yield document
        else:
            on_bad(BadRecord(path, counter.lines, NOT_TEXT, f"column {key!r} is of type {column.type}, not string"))
