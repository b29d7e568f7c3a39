"""Documents from `.jsonl`, `.txt`, `.parquet`, `.warc` and plain text of any other name, each plain, `.gz` or `.zst`.

Files are read as bytes and decoded record by record, so one bad byte costs one record and never the file. Whatever
cannot be used is handed to the caller as a `BadRecord` with its file, line and reason; nothing is dropped in silence.
A file's format is detected by its first bytes, and by its name if those are ambiguous (`formats`).

A byte range [start, end) of an uncompressed `.jsonl` or `.parquet` file means the lines (row groups) that *begin* in
it, so ranges that tile a file give every document exactly once, and processes need no parent that feeds them.
"""

import json
import tempfile
from collections.abc import Iterator
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
    too_long,
)

PARQUET_ROWS = 256


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
    kind, compression = file_format(path)
    if byte_range is not None and not is_splittable(kind, compression):
        if byte_range[0] > 0:
            return  # the file is one piece, which begins at byte 0
        byte_range = None
    limit = max_record_bytes
    try:
        if kind == "jsonl":
            documents = _json_lines(path, compression, key, byte_range, on_bad, counter, limit)
        elif kind == "json":
            documents = _json_value(path, compression, key, on_bad, counter, limit)
        elif kind == "parquet":
            documents = _parquet(path, compression, key, byte_range, on_bad, counter, with_extra)
        elif kind == "warc":
            from megalite.text.warc import read_warc

            documents = read_warc(path, on_bad, counter, limit)
        elif kind in ("text", "unknown"):
            documents = _text_file(path, compression, kind == "unknown", on_bad, counter, limit)
        else:
            on_bad(_unread(path, kind))
            return
        for document in documents:
            if not document.text:
                on_bad(BadRecord(path, document.line, EMPTY, "the text has no characters"))
            elif len(document.text) > limit:  # of a table, whose rows have no size before they are read
                on_bad(too_long(path, document.line, len(document.text), limit, "text"))
            else:
                yield document
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
    key: str,
    byte_range: tuple[int, int] | None,
    on_bad: OnBad,
    counter: ReadCounter,
    limit: int,
) -> Iterator[Document]:
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
        document = _from_record(path, counter.lines, record, key, line, on_bad)
        if document is not None:
            yield document


def _json_value(
    path: Path, compression: str, key: str, on_bad: OnBad, counter: ReadCounter, limit: int
) -> Iterator[Document]:
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
        document = _from_record(path, counter.lines, record, key, b"", on_bad)
        if document is not None:
            yield document


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


def _from_record(path: Path, line: int, record: Any, key: str, raw: bytes, on_bad: OnBad) -> Document | None:
    if type(record) is not dict:
        what = "the line" if raw else "the entry"
        detail = f"{what} holds a JSON {_json_type(record)}, not an object with a field {key!r}"
        on_bad(BadRecord(path, line, NOT_AN_OBJECT, detail, raw))
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
