"""Third-party files and libraries: bounded reads, and one-line errors for whatever goes wrong."""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from megalite.errors import UserError

_SOURCE = re.compile(r"^\w+: [\w./]+\.cc\(\d+\) \[.*?\] ?", re.DOTALL)  # what sentencepiece begins its errors with


def read_small_file(path: Path | str, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger; `strerror` says which.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO must not wait
    except ValueError:  # a NUL in the name
        raise FileNotFoundError(2, "no such file", str(path)) from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(22, "not a regular file", str(path))
        data = file.read(limit + 1)  # the size of a file in /proc says nothing
    if len(data) > limit:
        raise OSError(27, f"larger than {limit:,} bytes", str(path))
    return data


def shorten(value: object, characters: int = 200) -> str:
    """A value or an error as part of a message of one line: never long, without the place in a library's source."""
    try:
        shown = _SOURCE.sub("", str(value)) if isinstance(value, BaseException) else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nesting without end
        return f"<{type(value).__name__}>"
    shown = " ".join(shown.split())
    return shown if len(shown) <= characters else f"{shown[: characters - 1]}…"


@contextlib.contextmanager
def library_errors(file: Path | str, what: str) -> Iterator[None]:
    """Within, whatever a library raises (a Rust panic is no `Exception`) is a `UserError` about a tokenizer's file."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = shorten(error)
        raise UserError(f"tokenizer {file}: {what}" + (f" ({reason})" if reason else "")) from None
