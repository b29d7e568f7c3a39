"""Token files in Megatron-LM's `.bin/.idx` format: streaming writer and memory-mapped reader.

`PREFIX.bin` holds the tokens of all sequences one after another, without a header. `PREFIX.idx` (little-endian) holds

    offset      bytes  content
    0           9      b"MMIDIDX\\x00\\x00"
    9           8      uint64 version = 1
    17          1      uint8 code of the token dtype (`DTYPE_CODES`)
    18          8      uint64 sequences N
    26          8      uint64 documents + 1 = D
    34          4 N    int32 tokens of each sequence
    34 + 4 N    8 N    int64 byte offset of each sequence in PREFIX.bin
    34 + 12 N   8 D    int64 document boundaries: document i is the sequences [boundary[i], boundary[i + 1])

(the format of `megatron/core/datasets/indexed_dataset.py`). `PREFIX.json`, which Megatron-LM ignores, holds counts,
checksums and provenance. An empty document is a document without sequences.

This module must not import torch, so that the offline tools start in a fraction of a second.
"""

import contextlib
import hashlib
import json
import stat
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self

import numpy as np

import megalite
from megalite.errors import UserError
from megalite.files import PendingFile, atomic_file, read_bounded, write_atomically, write_errors_named

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
TOKEN_DTYPES = {code: dtype for code, dtype in DTYPE_CODES.items() if dtype.kind in "iu"}
INT32, INT64 = np.dtype("<i4"), np.dtype("<i8")
CHUNK = 1 << 20  # entries in memory at once when a whole file is scanned
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 256, 4096
DESCRIPTION_BYTES = 1 << 30  # maximum size of PREFIX.json, which lists every input file


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron-LM stores token ids of this vocabulary in: uint16 below 65500 entries, else int32."""
    return DTYPE_CODES[8] if vocab_size < 65500 else DTYPE_CODES[4]


def file_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """`PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


class IndexedWriter:
    """Writes one token file in bounded memory; files get their final names only when everything is on disk.

    Args:
        prefix: output path without `.bin`.
        dtype: integer dtype the tokens are stored in (see `token_dtype`).

    As a context manager it finishes on a clean exit and removes its temporary files after an exception. Raises
    `UserError` for a token id that the dtype cannot hold, and when writing fails.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in TOKEN_DTYPES.items() if known == self.dtype]
        if not codes:
            raise UserError(
                f"{prefix}: dtype {dtype} cannot be stored; use one of uint16, int32, int64, uint8, int8, int16"
            )
        self._code = codes[0]
        self.sequences = self.documents = self.tokens = 0
        self._bin, self._idx, self._json = file_paths(prefix)
        self._hash = hashlib.sha256()
        with write_errors_named(self._bin):
            self._bin.parent.mkdir(parents=True, exist_ok=True)
            self._pending = PendingFile(self._bin)
            folder = self._bin.parent
            self._parts = {name: tempfile.TemporaryFile(dir=folder) for name in ("lengths", "documents")}  # noqa: SIM115
        self._write("documents", np.zeros(1, INT64))

    def add_document(self, tokens: Any) -> None:
        """Append one document: token ids [tokens] of any integer dtype, or a list. An empty one has no sequence."""
        array = np.asarray(tokens)
        self.add_documents(array, np.array([array.size], INT32))

    def add_documents(self, tokens: Any, lengths: Any) -> None:
        """Append many documents, one sequence each: their concatenated ids, and the length of each document."""
        token_array, length_array = np.asarray(tokens), np.asarray(lengths)
        if int(length_array.sum(dtype=np.int64)) != token_array.size:
            raise ValueError(f"lengths add up to {length_array.sum()}, but there are {token_array.size} tokens")
        kept = length_array > 0
        self._append(self._checked(token_array, length_array), length_array[kept], np.cumsum(kept, dtype=np.int64))

    def add_dataset(self, dataset: "IndexedDataset") -> None:
        """Append a whole token file of the same dtype, in pieces."""
        if dataset.dtype != self.dtype:
            raise UserError(
                f"{dataset.prefix}.idx: token dtype {dataset.dtype} differs from {self.dtype} of {self.prefix};"
                " tokenize both with the same vocabulary"
            )
        for tokens in dataset.pieces("tokens"):
            self._write("bin", tokens)
        for lengths in dataset.pieces("lengths"):
            self._write("lengths", lengths)
        for number, boundaries in enumerate(dataset.pieces("boundaries")):
            self._write("documents", boundaries[number == 0 :] + self.sequences)  # the first boundary is always 0
        self.tokens += dataset.tokens.size
        self.sequences += len(dataset)
        self.documents += dataset.documents

    def finish(self, provenance: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Put the three files under their final names (`.idx` last) and return what `PREFIX.json` holds.

        `provenance` (JSON values) is stored beside the counts and checksums.
        """
        with write_errors_named(self._idx), atomic_file(self._idx) as idx:
            self._write_index(idx)
            for stale in (self._idx, self._json):  # a crash between the renames must not pair the new .bin with them
                stale.unlink(missing_ok=True)
            self._pending.commit()
        self.abort()
        description = {**(provenance or {}), **self._describe()}
        with write_errors_named(self._json):
            write_atomically(self._json, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        return description

    def abort(self) -> None:
        """Close and remove every temporary file; finished files stay."""
        self._pending.abort()
        for file in self._parts.values():
            with contextlib.suppress(OSError):  # the last flush fails on a full disk
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._pending.file.closed:
            try:
                self.finish()
            finally:
                self.abort()
        else:
            self.abort()

    def _checked(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if tokens.dtype == self.dtype or tokens.size == 0:
            return tokens.astype(self.dtype, copy=False)
        if tokens.dtype.kind not in "iu":
            raise UserError(f"{self.prefix}: token ids must be integers, not {tokens.dtype}")
        limits = np.iinfo(self.dtype)
        if tokens.min() < limits.min or tokens.max() > limits.max:
            where = int(np.flatnonzero((tokens < limits.min) | (tokens > limits.max))[0])
            document = self.documents + int(np.searchsorted(np.cumsum(lengths), where, side="right"))
            raise UserError(
                f"{self.prefix}: document {document}: token id {tokens[where]} does not fit in {self.dtype};"
                " the tokenizer has more entries than the dtype was chosen for"
            )
        return tokens.astype(self.dtype)

    def _append(self, tokens: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> None:
        if lengths.size and lengths.max() > np.iinfo(INT32).max:
            raise UserError(f"{self.prefix}: a document of {lengths.max()} tokens; the format allows 2147483647")
        self._write("bin", tokens)
        self._write("lengths", lengths)
        self._write("documents", ends + self.sequences)
        self.tokens += tokens.size
        self.sequences += lengths.size
        self.documents += ends.size

    def _write(self, name: str, array: np.ndarray) -> None:
        dtype = {"bin": self.dtype, "lengths": INT32, "documents": INT64}[name]
        payload = np.ascontiguousarray(array, dtype).data
        with write_errors_named(self._bin):
            (self._pending.file if name == "bin" else self._parts[name]).write(payload)
        if name == "bin":
            self._hash.update(payload)

    def _write_index(self, idx: BinaryIO) -> None:
        idx.write(HEADER.pack(MAGIC, VERSION, self._code, self.sequences, self.documents + 1))
        for lengths in file_pieces(self._parts["lengths"], INT32):
            idx.write(lengths.data)
        offset = 0
        for lengths in file_pieces(self._parts["lengths"], INT32):
            ends = offset + np.cumsum(lengths, dtype=INT64) * self.dtype.itemsize
            idx.write((ends - lengths.astype(INT64) * self.dtype.itemsize).data)
            offset = int(ends[-1])
        for boundaries in file_pieces(self._parts["documents"], INT64):
            idx.write(boundaries.data)

    def _describe(self) -> dict[str, Any]:
        dataset = IndexedDataset(self.prefix)
        return {
            "megalite_version": megalite.__version__,
            "dtype": str(self.dtype),
            "documents": self.documents,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "bin_sha256": self._hash.hexdigest(),
            "idx_sha256": file_sha256(self._idx),
            "fingerprint": dataset.fingerprint(),
        }


class IndexedDataset:
    """A token file opened read-only and memory-mapped; its arrays are views that keep the mapping alive.

    Attributes:
        tokens: all token ids, [tokens], dtype `dtype`.
        lengths: tokens of each sequence, int32 [sequences] (unaligned view).
        offsets: byte offset of each sequence in `.bin`, int64 [sequences] (unaligned view).
        boundaries: first sequence of each document and, last, the number of sequences, int64 [documents + 1].

    Raises `UserError` naming the file if it is missing, not a token file, of an unknown version or dtype, or if the
    sizes of `.idx` and `.bin` do not match. The contents are checked by `megalite.data.verify`.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        bin_path, idx_path, _ = file_paths(prefix)
        index = _map(idx_path)
        if index.size < HEADER.size or index[: len(MAGIC)].tobytes() != MAGIC:
            raise UserError(f"{idx_path}: not a token index ({index.size} bytes without Megatron's MMIDIDX header)")
        _, version, code, sequences, boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
        if version != VERSION:
            raise UserError(f"{idx_path}: version {version} of the format; only version {VERSION} is known")
        if code not in TOKEN_DTYPES:
            raise UserError(f"{idx_path}: dtype code {code} is no integer type; known are {sorted(TOKEN_DTYPES)}")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if index.size == expected + sequences and sequences:
            raise UserError(f"{idx_path}: holds multimodal modes; only text token files can be read")
        if index.size != expected or boundaries < 1:
            raise UserError(
                f"{idx_path}: {index.size} bytes, but its header's {sequences} sequences make {expected};"
                " the file is truncated or damaged: write it again"
            )
        self.dtype = TOKEN_DTYPES[code]
        body = index[HEADER.size :]
        self.lengths = body[: 4 * sequences].view(INT32)
        self.offsets = body[4 * sequences : 12 * sequences].view(INT64)
        self.boundaries = body[12 * sequences :].view(INT64)
        data = _map(bin_path)
        end = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if data.size != end or end % self.dtype.itemsize:
            raise UserError(
                f"{bin_path}: {data.size} bytes, but its index ends at {end};"
                " the file is truncated or belongs to another index: write both again"
            )
        if int(self.boundaries[0]) != 0 or int(self.boundaries[-1]) != sequences:
            raise UserError(f"{idx_path}: its documents do not cover its {sequences} sequences; write the file again")
        self.tokens = data.view(self.dtype)
        self._fingerprint = ""

    def __len__(self) -> int:
        """Number of sequences (what splits and sample indices count)."""
        return self.lengths.size

    @property
    def documents(self) -> int:
        return self.boundaries.size - 1

    def __getitem__(self, sequence: int) -> np.ndarray:
        """Token ids of one sequence, a view [length]."""
        return self.slice(sequence, 0, int(self.lengths[sequence]))

    def slice(self, sequence: int, start: int, stop: int) -> np.ndarray:
        """Token ids `start` to `stop` of one sequence, a view."""
        first, odd = divmod(int(self.offsets[sequence]), self.dtype.itemsize)
        if odd or first < 0 or stop < start or first + stop > self.tokens.size:
            raise self._damaged(f"sequence {sequence} lies outside the file or between two tokens")
        return self.tokens[first + start : first + stop]

    def document(self, number: int) -> np.ndarray:
        """Token ids of one document (all its sequences), [length]."""
        sequences = range(int(self.boundaries[number]), int(self.boundaries[number + 1]))
        if not 0 <= sequences.start <= sequences.stop <= len(self):
            raise self._damaged(f"document {number} has no such sequences")
        return np.concatenate([self[sequence] for sequence in sequences] or [self.tokens[:0]])

    def require_lengths(self) -> None:
        """Scan the lengths, which determine the samples: `UserError` if they do not add up to the file's tokens."""
        total = 0
        for number, lengths in enumerate(self.pieces("lengths")):
            if lengths.min() < 0:
                where = number * CHUNK + int(np.argmin(lengths))
                raise self._damaged(f"sequence {where} has length {lengths.min()}")
            total += int(lengths.sum(dtype=np.int64))
        if total != self.tokens.size:
            raise self._damaged(f"its sequences have {total} tokens, but the .bin has {self.tokens.size}")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.prefix}.idx: {what}; the file is damaged: write it again")

    def document_of(self, sequence: int) -> int:
        """Number of the document that holds this sequence."""
        return int(np.searchsorted(self.boundaries, sequence, side="right")) - 1

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The array `tokens`, `lengths`, `offsets` or `boundaries` in pieces of at most 2^20 entries.

        Uses plain file reads: scanning the whole mapping would count as memory of this process.
        """
        bin_path, idx_path, _ = file_paths(self.prefix)
        count = len(self)
        path, dtype, start, entries = {
            "tokens": (bin_path, self.dtype, 0, self.tokens.size),
            "lengths": (idx_path, INT32, HEADER.size, count),
            "offsets": (idx_path, INT64, HEADER.size + 4 * count, count),
            "boundaries": (idx_path, INT64, HEADER.size + 12 * count, self.documents + 1),
        }[name]
        return read_pieces(path, dtype, start, entries)

    def fingerprint(self) -> str:
        """sha256 (hex) of dtype, counts, every length, and 256 blocks spread over the tokens; independent of paths.

        Files with equal fingerprints have equal sample indices; `verify` checks all tokens against the full checksums
        in `PREFIX.json`.
        """
        if self._fingerprint:
            return self._fingerprint
        digest = hashlib.sha256(f"{self.dtype.str} {len(self)} {self.documents} {self.tokens.size}".encode())
        for lengths in self.pieces("lengths"):
            digest.update(lengths.data)
        data = self.tokens.view(np.uint8)
        last = max(data.size - FINGERPRINT_BLOCK_BYTES, 0)
        for block in range(FINGERPRINT_BLOCKS):
            start = last * block // (FINGERPRINT_BLOCKS - 1)
            digest.update(data[start : start + FINGERPRINT_BLOCK_BYTES].data)
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def description(self) -> dict[str, Any]:
        """The content of `PREFIX.json`; empty if there is none (files from Megatron-LM)."""
        path = file_paths(self.prefix)[2]
        try:
            description = json.loads(read_bounded(path, DESCRIPTION_BYTES))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error}); write the token file again or delete this one") from error
        if not _is_description(description):
            raise UserError(
                f"{path}: not the description of a token file; write the token file again or delete this one"
            )
        return description

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        return IndexedDataset, (self.prefix,)


_NOTES = {"fingerprint": str, "bin_sha256": str, "idx_sha256": str, "tokenizer": dict, "merged_from": list}
_TOKENIZER_NOTES = {"kind": str, "files": list, "sha256": str, "vocab_size": int, "eod": int | None}
_SOURCE_NOTES = {"name": str, "tokens": int}


def _is_description(value: Any) -> bool:
    """Whether the fields of `PREFIX.json` that are used have the right types; every field is optional."""

    def fits(entry: Any, kinds: Mapping[str, Any]) -> bool:
        return isinstance(entry, dict) and all(
            isinstance(entry[name], kind) for name, kind in kinds.items() if name in entry
        )

    if not fits(value, _NOTES) or not fits(value.get("tokenizer", {}), _TOKENIZER_NOTES):
        return False
    names = value.get("tokenizer", {}).get("files", [])
    sources = value.get("merged_from", [])
    return all(isinstance(name, str) for name in names) and all(fits(source, _SOURCE_NOTES) for source in sources)


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped, as a plain array [bytes] that keeps the mapping alive."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is no regular file; give the prefix of a .bin and .idx beside each other")
        if status.st_size == 0:
            return np.empty(0, np.uint8)  # an empty file cannot be mapped
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the prefix of a .bin and .idx beside each other") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{str(path)!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_pieces(path: Path, dtype: np.dtype, start: int = 0, entries: int = -1) -> Iterator[np.ndarray]:
    """`entries` entries (default: all) of a file from byte `start` on, in pieces of at most `CHUNK`."""
    with open(path, "rb") as file:
        yield from file_pieces(file, dtype, start, entries)


def file_pieces(file: IO[bytes], dtype: np.dtype, start: int = 0, entries: int = -1) -> Iterator[np.ndarray]:
    """`read_pieces` of an open file."""
    file.seek(start)
    while (piece := np.fromfile(file, dtype, CHUNK if entries < 0 else min(CHUNK, entries))).size:
        yield piece
        entries -= piece.size if entries > 0 else 0
