"""Text in, text out: what cleaning and deduplication share. Each unit of the input becomes one `.jsonl.zst` shard."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson
import zstandard

from megalite.errors import UserError
from megalite.files import atomic_file, write_errors_named
from megalite.text.jobs import Unit, begin_notes, known_fingerprint
from megalite.text.readers import read_documents
from megalite.text.records import DAMAGED, MAX_RECORD_BYTES, BadRecord, Document

REJECTED_DIRECTORY = "rejected"
EXAMPLES = 5


@dataclass
class Unusable:
    """Unusable records, counted by reason, with details of the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, record: BadRecord) -> None:
        self.counts[record.reason] = self.counts.get(record.reason, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(str(record))

    def include(self, other: dict[str, Any]) -> None:
        """Add the counts of another unit, given as `asdict` made them."""
        for reason, count in other["counts"].items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples = (self.examples + other["examples"])[:EXAMPLES]

    def check(self, usable: int, max_ratio: float, allow_damaged: bool) -> None:
        """Refuse input with too many unusable records.

        Raises:
            UserError: no record is usable, or more than `max_ratio` of them are not, or a file is damaged.
        """
        bad = sum(self.counts.values())
        if not bad and not usable:
            raise UserError("--input holds no documents: give files with text")
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.counts.items()))
        if self.counts.get(DAMAGED) and not allow_damaged:
            raise UserError(
                f"damaged input ({self._example(DAMAGED)}): replace the file, or accept with --allow-damaged"
            )
        if bad and bad > max_ratio * (bad + usable):
            remedy = "mend the input or --key, or raise --max-bad-ratio"
            raise UserError(
                f"{bad} of {bad + usable} records cannot be used ({reasons}), first {self.examples[0]}; {remedy}"
            )

    def _example(self, reason: str) -> str:
        return next(
            (example for example in self.examples if f": {reason}: " in example), f"{self.counts[reason]} files"
        )


def read_unit(
    unit: Unit, key: str, unusable: Unusable, with_extra: bool = True, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[int, Document]]:
    """The documents of a unit in order, each with the number of its piece; bad records go to `unusable`."""
    for number, piece in enumerate(unit.pieces):
        for document in read_documents(
            piece.path, key, piece.byte_range, unusable.add, with_extra=with_extra, max_record_bytes=max_record_bytes
        ):
            yield number, document


def open_output(directory: Path, identity: str) -> None:
    """Make the output directory, or accept one that an interrupted run with the same input and settings left.

    Raises:
        UserError: the directory holds something else, which is never overwritten.
    """
    try:
        if directory.exists() and any(directory.iterdir()):
            known = known_fingerprint(directory)
            if known != identity:
                why = "was made from other input or settings" if known else "holds other files"
                raise UserError(f"--output {directory} {why}: give a new directory, or remove it first")
    except (NotADirectoryError, FileExistsError):
        raise UserError(f"--output {directory} is not a directory: give the name of a directory") from None
    except OSError as error:
        raise UserError(f"--output {directory} cannot be used ({error.strerror}): choose a directory you own") from None
    begin_notes(directory, identity)


class TextShard:
    """Writes records as zstd-compressed JSON lines; the final name appears only when the block ends without an error.

    Values that JSON does not know (bytes and decimals of a parquet file, say) are written as strings.
    """

    def __init__(self, path: Path, level: int = 3) -> None:
        self.path = path
        self._frame = zstandard.ZstdCompressor(level=level, write_checksum=True)
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "TextShard":
        with contextlib.ExitStack() as stack:
            stack.enter_context(write_errors_named(self.path))
            file = stack.enter_context(atomic_file(self.path))
            self._stream = stack.enter_context(self._frame.stream_writer(file, closefd=False))
            self._exit = stack.pop_all()
        return self

    def write(self, record: dict[str, Any]) -> None:
        self._stream.write(orjson.dumps(record, default=_as_text, option=orjson.OPT_APPEND_NEWLINE))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._exit.__exit__(kind, error, trace)


@contextlib.contextmanager
def open_shards(output: Path, unit: Unit, keep_rejected: bool) -> Iterator[tuple[TextShard, TextShard | None]]:
    """The unit's shard and, where `keep_rejected`, the one of what is left out of it, in a directory of its own."""
    with contextlib.ExitStack() as stack:
        shard, rejected = stack.enter_context(TextShard(output / unit.shard_name)), None
        if keep_rejected:
            with write_errors_named(output / REJECTED_DIRECTORY):
                (output / REJECTED_DIRECTORY).mkdir(exist_ok=True)
            rejected = stack.enter_context(TextShard(output / REJECTED_DIRECTORY / unit.shard_name))
        yield shard, rejected


def _as_text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
