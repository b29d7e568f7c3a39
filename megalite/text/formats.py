"""File format detection by content and name, and reading as blocks and lines in bounded memory."""

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import zstandard

from megalite.errors import UserError
from megalite.text.records import Damaged, ReadCounter

READ_BYTES = 1 << 20
COMPRESSED_READ_BYTES = 1 << 16
ZSTD_READ_BYTES = 1 << 11  # of which 128 KiB for every 4 bytes can come: 64 MiB at most at once
HEAD_BYTES = 1 << 16
UTF8_BOM = b"\xef\xbb\xbf"
COMPRESSIONS = (".gz", ".zst")
JSON_LINES = (".jsonl", ".ndjson", ".json")

_GZIP, _ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
_BZIP2 = {b"BZh%d1AY&SY" % level: "bzip2 data" for level in range(1, 10)}
_FOREIGN = _BZIP2 | {
    b"\xfd7zXZ\0": "xz data", b"\x04\x22\x4d\x18": "lz4 data", b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"ARROW1\0\0": "an Arrow file", b"Obj\x01": "an Avro file",
    _GZIP: "data compressed twice", _ZSTD: "data compressed twice",
}  # fmt: skip
_ARRAY_OF_OBJECTS = re.compile(rb"\[\s*\{")
_OBJECT_OVER_LINES = re.compile(rb'\{\s*\n\s*"')
_OBJECT = re.compile(rb'\{\s*"')


def named_format(path: Path) -> tuple[str, str]:
    """The format by file name: (`jsonl`, `parquet`, `warc`, `text` or `unknown`, and `.gz`, `.zst` or nothing)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind in JSON_LINES:
        return "jsonl", compression
    return {".parquet": "parquet", ".warc": "warc", ".txt": "text"}.get(kind, "unknown"), compression


def file_format(path: Path) -> tuple[str, str]:
    """The format of a file: (kind, compression), by its first bytes if conclusive, otherwise by its name.

    Kinds: those of `named_format`; `json` for one JSON array of objects, or one object over several lines; `misnamed`
    for JSON lines that are called `.txt`; and the name of a format that is not read, such as "bzip2 data".

    Raises:
        UserError: the file cannot be read.
    """
    named, packed = named_format(path)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    compression = {_GZIP: ".gz", _ZSTD: ".zst"}.get(head[:3], {_ZSTD: ".zst"}.get(head[:4], ""))
    whole = len(head) < HEAD_BYTES
    if packed and not compression:
        # Unpacked on the way (as some downloads are), if it is plainly that; otherwise damaged
        kind = _told(named, _has_suffix(path), head, whole)
        plain = kind != named or head.startswith((b"PAR1", b"WARC/")) or _leading_objects(head, whole)
        return (kind, "") if plain else (named, packed)
    if compression:
        head, whole = _decompressed_head(path, compression)
    return _told(named, _has_suffix(path), head, whole), compression


def can_split(path: Path) -> bool:
    """Whether byte ranges of this file can be read apart."""
    return is_splittable(*file_format(path))


def is_splittable(kind: str, compression: str) -> bool:
    """Whether byte ranges of files of this format can be read apart."""
    return kind in ("jsonl", "parquet") and not compression


def _has_suffix(path: Path) -> bool:
    return any(suffix.lower() not in COMPRESSIONS for suffix in path.suffixes)


def _decompressed_head(path: Path, compression: str) -> tuple[bytes, bool]:
    head = b""
    try:
        for block in blocks(path, compression, ReadCounter(), HEAD_BYTES):
            head += block
            if len(head) >= HEAD_BYTES:
                return head[:HEAD_BYTES], False
    except Damaged:
        return head, False
    return head, True


def _told(named: str, has_suffix: bool, head: bytes, whole: bool) -> str:
    """The kind of a file that begins with `head` (or is it, if `whole`)."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"WARC/"):
        return "warc"
    if foreign := next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), ""):
        return foreign
    objects = _leading_objects(head, whole)
    if named == "text":
        return "misnamed" if objects > 1 else named
    if named == "unknown" and has_suffix:
        return "jsonl" if objects > 1 else named  # source code may be one JSON value
    if _is_one_value(head, whole):
        return "json"
    return "jsonl" if objects else named


def _leading_objects(head: bytes, whole: bool) -> int:
    """How many of the first two lines that are not blank are JSON objects; a line longer than `head` may be one."""
    lines = head.removeprefix(UTF8_BOM).split(b"\n")
    cut = None if whole else len(lines) - 1
    count = 0
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        if count == 2 or not _is_object(line, cut=number == cut):
            break
        count += 1
    return count


def _is_object(line: bytes, cut: bool) -> bool:
    if cut:
        return bool(_OBJECT.match(line.lstrip()))
    return isinstance(_parsed(line), dict)


def _is_one_value(head: bytes, whole: bool) -> bool:
    text = head.removeprefix(UTF8_BOM).lstrip()
    first, _, rest = text.partition(b"\n")
    if _ARRAY_OF_OBJECTS.match(text):
        return not rest.strip() or (_parsed(first) is None and _leading_objects(rest, whole) < 2)
    if whole and text.startswith(b"["):
        return isinstance(_parsed(text), list)
    return bool(_OBJECT_OVER_LINES.match(text))


def _parsed(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


# ---- bytes


def blocks(path: Path, compression: str, counter: ReadCounter, block_bytes: int = READ_BYTES) -> Iterator[bytes]:
    """The decompressed content, in order; raises `Damaged` after what could be read of a truncated file.

    A block is of at most about 64 MiB, however much a compressed file makes of few bytes.
    """
    with open(path, "rb") as file:
        if not compression:
            while block := file.read(block_bytes):
                counter.bytes += len(block)
                yield block
            return
        gathered: list[bytes] = []
        size = 0
        try:
            for data in _decompressed(file, compression, counter):
                gathered.append(data)
                size += len(data)
                if size >= block_bytes:
                    yield b"".join(gathered)
                    gathered, size = [], 0
        except Damaged:
            if gathered:
                yield b"".join(gathered)
            raise
        if gathered:
            yield b"".join(gathered)


def _decompressed(file: Any, compression: str, counter: ReadCounter) -> Iterator[bytes]:
    unpack = _new_decompressor(compression)
    started = False  # whether a member or frame is open: then the end of the file is too early
    while block := file.read(COMPRESSED_READ_BYTES if compression == ".gz" else ZSTD_READ_BYTES):
        counter.bytes += len(block)
        while block:
            if not started and not block.strip(b"\0"):
                break  # zero padding between or after members
            try:
                data = unpack.decompress(block)
            except (zlib.error, zstandard.ZstdError, MemoryError) as error:
                raise Damaged(f"broken {compression} data ({error}); what came before it was kept") from error
            started, block = True, b""
            if data:
                yield data
            if unpack.eof:
                started, block, unpack = False, unpack.unused_data, _new_decompressor(compression)
    if started:
        raise Damaged(f"the {compression} data end too early; what came before was kept")


def _new_decompressor(compression: str) -> Any:
    if compression == ".gz":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def lines(content: Iterator[bytes], limit: int) -> Iterator[bytes | int]:
    """Lines without their "\\n"; one of more than `limit` bytes comes as its size.

    Only that byte ends a line, so a lone CR or U+2028 does not cut a record.
    """
    pending: list[bytes] = []
    size = 0
    for block in content:
        first, *rest = block.split(b"\n")
        size += len(first)
        pending.append(first)
        if size > limit:
            pending.clear()
        if rest:
            yield size if size > limit else b"".join(pending)
            yield from rest[:-1] if len(block) <= limit else (_within(line, limit) for line in rest[:-1])
            pending, size = [rest[-1]], len(rest[-1])
    if size:
        yield size if size > limit else b"".join(pending)


def _within(line: bytes, limit: int) -> bytes | int:
    return line if len(line) <= limit else len(line)


def lines_in_range(path: Path, start: int, end: int, limit: int, counter: ReadCounter) -> Iterator[bytes | int]:
    """The lines whose first byte lies in [start, end), without their "\\n", as `lines` gives them."""
    with open(path, "rb", buffering=READ_BYTES) as file:
        position = start
        if start > 0:
            file.seek(start - 1)
            position += _skip_line(file, end - start + 1) - 1  # to the first line that begins at or after `start`
        while position < end and (line := file.readline(limit + 1)):
            size = len(line)
            if size > limit and not line.endswith(b"\n"):
                del line
                size += _skip_line(file, os.fstat(file.fileno()).st_size)
                position += size
                counter.bytes = position - start
                yield size
            else:
                position += size
                counter.bytes = position - start
                yield line.removesuffix(b"\n")


def _skip_line(file: Any, most: int) -> int:
    """Read to the end of the line, `most` bytes at most; returns how many."""
    skipped = 0
    while skipped < most and (part := file.readline(min(READ_BYTES, most - skipped))):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped
