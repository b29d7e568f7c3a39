"""Documents from `.jsonl`, `.txt`, `.parquet`, `.warc` and plain text of any other name, each plain, `.gz` or `.zst`.

Files are read as bytes and decoded record by record, so one bad byte costs one record and never the file. Whatever
cannot be used is handed to the caller as a `BadRecord` with its file, line and reason; nothing is dropped in silence.
A file's format is detected by its first bytes, and by its name if those are ambiguous (`formats`).

A byte range [start, end) of an uncompressed `.jsonl` or `.parquet` file means the lines (row groups) that *begin* in
it, so ranges that tile a file give every document exactly once, and processes need no parent that feeds them.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import orjson

from megalite.errors import UserError
from megalite.text.formats import UTF8_BOM, blocks, file_format, is_splittable, lines, lines_in_range
from megalite.text.records import (
    BINARY,
    BROKEN_JSON,
    DAMAGED,
    EMPTY,
    INVALID_UTF8,
    LONE_SURROGATE,
    MAX_RECORD_BYTES,
    MISNAMED,
    MISSING_KEY,
    NOT_AN_OBJECT,
    NOT_TEXT,
    BadRecord,
    Damaged,
    Document,
    OnBad,
    ReadCounter,
    Record,
    too_long,
)

PARQUET_ROWS = 256

Found = Document | Record
Take = Callable[[int, Any, bytes], Found | None]
"""Makes what is wanted of (line, value, raw bytes), or hands it on as unusable and returns None."""


def read_documents(
    path: str | Path,
    key: str = "text",
    byte_range: tuple[int, int] | None = None,
    on_bad: OnBad | None = None,
    counter: ReadCounter | None = None,
    with_extra: bool = True,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Document]:
    """The documents of one file, in order, in bounded memory (one record at a time).

    Args:
        path: the file. One that holds nothing known is one text document.
        key: the field or column that holds the text.
        byte_range: only the records that begin in [start, end); lines then count from the first of them.
        on_bad: gets every record that cannot be used; without it the first one raises.
        counter: is kept up to date while reading.
        with_extra: whether documents carry the record's other fields (a table's other columns are not read without).
        max_record_bytes: a longer line, text file or JSON array is unusable.

    Raises:
        UserError: the file cannot be opened, or a bad record and no `on_bad`.
    """
    path = Path(path)
    on_bad = on_bad or _refuse
    counter = counter if counter is not None else ReadCounter()
    take = partial(_document, path, key, on_bad)
    for document in _read(path, take, on_bad, counter, max_record_bytes, byte_range, key, with_extra):
        if not document.text:
            on_bad(BadRecord(path, document.line, EMPTY, "the text has no characters"))
        elif len(document.text) > max_record_bytes:  # of a table, whose rows have no size before they are read
            on_bad(too_long(path, document.line, len(document.text), max_record_bytes, "text"))
        else:
            yield document


def read_records(
    path: str | Path,
    byte_range: tuple[int, int] | None = None,
    on_bad: OnBad | None = None,
    counter: ReadCounter | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Record]:
    """The records of a JSON-lines, JSON or parquet file, whatever their fields; see `read_documents`."""
    path = Path(path)
    on_bad = on_bad or _refuse
    counter = counter if counter is not None else ReadCounter()
    yield from _read(path, partial(_record, path, on_bad), on_bad, counter, max_record_bytes, byte_range)


def _read(
    path: Path,
    take: Take,
    on_bad: OnBad,
    counter: ReadCounter,
    limit: int,
    byte_range: tuple[int, int] | None,
    key: str | None = None,
    with_extra: bool = True,
) -> Iterator[Any]:
    """What `take` makes of the file's records. `key` is the column that a table must have, and all that is read of it
    without `with_extra`; without a key only files of records can be read, not texts."""
    kind, compression = file_format(path)
    if byte_range is not None and not is_splittable(kind, compression):
        if byte_range[0] > 0:
            return  # the file is one piece, which begins at byte 0
        byte_range = None
    try:
        if kind == "jsonl":
            yield from _json_lines(path, compression, take, byte_range, on_bad, counter, limit)
        elif kind == "json":
            yield from _json_value(path, compression, take, on_bad, counter, limit)
        elif kind == "parquet":
            yield from _parquet(path, compression, take, byte_range, on_bad, counter, key, with_extra)
        elif key is None:
            on_bad(BadRecord(path, 1, NOT_AN_OBJECT, "holds no records; give .jsonl or .parquet files"))
        elif kind == "warc":
            from megalite.text.warc import read_warc

            yield from read_warc(path, on_bad, counter, limit)
        elif kind in ("text", "unknown"):
            yield from _text_file(path, compression, kind == "unknown", on_bad, counter, limit)
        else:
            on_bad(_unread(path, kind))
    except Damaged as damage:
        on_bad(BadRecord(path, counter.lines + 1, DAMAGED, str(damage)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _refuse(record: BadRecord) -> NoReturn:
    raise UserError(f"{record}; mend or remove the record")


def _unread(path: Path, kind: str) -> BadRecord:
    if kind == "misnamed":
        return BadRecord(path, 1, MISNAMED, "its lines are JSON objects, but a .txt file is one text; call it .jsonl")
    return BadRecord(path, 1, BINARY, f"holds {kind}, which is not read; unpack it, or pack it with gzip or zstd")


# ---- formats


def _json_lines(
    path: Path,
    compression: str,
    take: Take,
    byte_range: tuple[int, int] | None,
    on_bad: OnBad,
    counter: ReadCounter,
    limit: int,
) -> Iterator[Found]:
    if byte_range is None:
        content = lines(blocks(path, compression, counter), limit)
    else:
        content = lines_in_range(path, *byte_range, limit, counter)
    at_file_start = byte_range is None or byte_range[0] == 0
    for line in content:
        counter.lines += 1
        if isinstance(line, int):
            on_bad(too_long(path, counter.lines, line, limit, "line"))
            continue
        if counter.lines == 1 and at_file_start:
            line = line.removeprefix(UTF8_BOM)
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if not line.strip():
                continue  # a blank line is not a record
            record = _second_opinion(path, counter.lines, line, str(error), on_bad)
            if record is None:
                continue
        found = take(counter.lines, record, line)
        if found is not None:
            yield found


def _json_value(
    path: Path, compression: str, take: Take, on_bad: OnBad, counter: ReadCounter, limit: int
) -> Iterator[Found]:
    """The objects of one JSON array, or one object over several lines; `line` is the number of the object."""
    content = _whole(path, compression, counter, limit)
    if isinstance(content, int):
        on_bad(too_long(path, 1, content, limit, "JSON array, read as a whole,"))
        return
    raw = content.removeprefix(UTF8_BOM)
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        value = _second_opinion(path, 1, raw, str(error), on_bad)
        if value is None:
            return
    for record in value if type(value) is list else [value]:
        counter.lines += 1
        found = take(counter.lines, record, b"")
        if found is not None:
            yield found


def _whole(path: Path, compression: str, counter: ReadCounter, limit: int) -> bytes | int:
    """The content of a file, or its size if that exceeds `limit`."""
    gathered: list[bytes] = []
    size = 0
    for block in blocks(path, compression, counter):
        size += len(block)
        gathered.append(block)
        if size > limit:
            gathered.clear()
    return b"".join(gathered) if size <= limit else size


def _second_opinion(path: Path, line: int, raw: bytes, error: str, on_bad: OnBad) -> Any:
    """Why orjson refused the line; the record itself if only for a NaN, which Python's own parser accepts."""
    try:
        record = json.loads(raw.decode(), parse_int=_as_orjson)
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


def _as_orjson(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)


def _json_type(value: object) -> str:
    return {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}.get(type(value), "null")


def _document(path: Path, key: str, on_bad: OnBad, line: int, record: Any, raw: bytes) -> Document | None:
    """The text of a record's field `key`."""
    if type(record) is not dict:
        on_bad(_no_object(path, line, record, raw, f" with a field {key!r}"))
        return None
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


def _record(path: Path, on_bad: OnBad, line: int, record: Any, raw: bytes) -> Record | None:
    if type(record) is dict:
        return Record(record, line, raw)
    on_bad(_no_object(path, line, record, raw))
    return None


def _no_object(path: Path, line: int, record: Any, raw: bytes, wanted: str = "") -> BadRecord:
    what = "the line" if raw else "the entry"
    return BadRecord(path, line, NOT_AN_OBJECT, f"{what} holds a JSON {_json_type(record)}, not an object{wanted}", raw)


def _text_file(
    path: Path, compression: str, check_binary: bool, on_bad: OnBad, counter: ReadCounter, limit: int
) -> Iterator[Document]:
    """The whole file as one document, unchanged except for a byte order mark."""
    gathered: list[bytes] = []
    size = 0
    damage: Damaged | None = None
    try:
        for block in blocks(path, compression, counter):
            if check_binary and not size and b"\0" in block:
                detail = f"NUL bytes in a file whose name ({path.suffix}) says no known format"
                on_bad(BadRecord(path, 1, BINARY, detail))
                return
            size += len(block)
            gathered.append(block)
            if size > limit:
                gathered.clear()
    except Damaged as error:
        damage = error
    if size > limit:
        counter.lines += 1
        on_bad(too_long(path, 1, size, limit, "text"))
        return
    raw = b"".join(gathered).removeprefix(UTF8_BOM)
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
    take: Take,
    byte_range: tuple[int, int] | None,
    on_bad: OnBad,
    counter: ReadCounter,
    key: str | None,
    with_extra: bool,
) -> Iterator[Found]:
    import pyarrow
    import pyarrow.parquet

    with _seekable(path, compression, counter) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if key is not None and key not in names:
                detail = f"no column {key!r}; columns there: {', '.join(map(repr, names))}"
                counter.lines += table.metadata.num_rows
                on_bad(BadRecord(path, 1, MISSING_KEY, detail))
                return
            groups = [
                group
                for group in range(table.num_row_groups)
                if byte_range is None or byte_range[0] <= _group_offset(table, group) < byte_range[1]
            ]
            for batch in table.iter_batches(PARQUET_ROWS, groups, None if with_extra or key is None else [key]):
                yield from _rows(path, batch, take, key, on_bad, counter)
        except pyarrow.ArrowException as error:
            raise Damaged(f"not readable as parquet ({str(error).splitlines()[0]})") from error
        start, end = byte_range or (0, path.stat().st_size)
        counter.bytes = end - start


def _seekable(path: Path, compression: str, counter: ReadCounter) -> IO[bytes]:
    """The file itself, or its decompressed copy in a temporary file: a parquet file's footer is at its end."""
    if not compression:
        return open(path, "rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        for block in blocks(path, compression, counter):
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


def _rows(path: Path, batch: Any, take: Take, key: str | None, on_bad: OnBad, counter: ReadCounter) -> Iterator[Found]:
    """What `take` makes of the rows; the column `key` must hold strings."""
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
        if key is not None and row[key] is not None and type(row[key]) is not str:
            kind = batch.schema.field(key).type
            on_bad(BadRecord(path, counter.lines, NOT_TEXT, f"column {key!r} is of type {kind}, not string"))
        elif (found := take(counter.lines, row, b"")) is not None:
            yield found
