"""The command line of every program: one parser, one way to refuse, one way to end.

Imports nothing that must be installed: launch/slurm.py runs on login nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import functools
import io
import math
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from megalite.errors import FAULT, INTERRUPTED, RunFailed, UserError, fail

CLOSED_PIPE = 128 + 13
"""Exit code where the reader of our output has left, as of a program that SIGPIPE ends."""

Result = TypeVar("Result")
Check = Callable[[Sequence[str]], object]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OVERRIDE = re.compile(r"--\w[\w-]*\.[^=]*(=.*)?", re.DOTALL)
_NEGATIVE_NUMBER = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
_LONG_WORD = re.compile(r"(\S{80})\S{80,}")


def program(main: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a program's `main`: how it ends is the same for all.

    A `UserError` becomes its one line and exit code 2, a `RunFailed` the same with exit code 1, Ctrl-C exit code 130, a
    reader of the output that has left (`| head`) exit code 141 without a word. No character ends it that the terminal
    or file cannot hold.
    """

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> Result:
        prepare_streams()
        try:
            try:
                return main(*args, **kwargs)
            except UserError as error:
                fail(str(error))
            except RunFailed as error:
                fail(str(error), FAULT)
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr, flush=True)
                raise SystemExit(INTERRUPTED) from None
            finally:
                flush_output()
        except BrokenPipeError:
            if not any(map(_reader_has_left, (sys.stdout, sys.stderr))):
                raise  # a pipe of the program's own
            _discard(sys.stdout, sys.stderr)
            raise SystemExit(CLOSED_PIPE) from None
        except OSError as error:  # of `print`; writers of files name theirs
            if error.filename is not None or error.errno not in _FULL:
                raise
            _discard(sys.stdout)
            fail(f"standard output cannot be written: {error.strerror}")

    return guarded


def prepare_streams() -> None:
    """Standard output and error that exist and take every character: those without a code are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Write out what standard output holds back. Leaves with code 141 where nobody reads, 2 where it is full."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        raise SystemExit(CLOSED_PIPE) from None
    except OSError as error:
        _discard(sys.stdout)
        fail(f"standard output cannot be written: {error.strerror}")


def _reader_has_left(stream: TextIO) -> bool:
    with contextlib.suppress(OSError, ValueError):  # not a file of the system
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _discard(*streams: TextIO) -> None:
    """Lead streams nowhere, so that the interpreter's last flush does not fail."""
    with open(os.devnull, "wb") as nowhere:
        for stream in streams:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), stream.fileno())


class Parser(argparse.ArgumentParser):
    """argparse, with every mistake as one line and exit code 2.

    An unknown option is answered first, with the nearest known one: what is missing is often what was mistyped. With
    `overrides`, `--section.field value` anywhere, and all that follows `--`, is collected in `options.overrides`;
    `overrides` is called with it and raises UserError for what it does not understand.
    """

    def __init__(
        self, description: str | None, epilog: str = "", *, prog: str | None = None, overrides: Check | None = None
    ) -> None:
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, epilog=epilog, formatter_class=shape, allow_abbrev=False)
        self._check_overrides = overrides
        self._negative_number_matcher = _NEGATIVE_NUMBER
        self.register("action", "gather", _Gather)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        overrides: list[str] = []
        if self._check_overrides is not None:
            words, overrides = self._take_overrides(words)
        if not {"-h", "--help"} & set(words):
            self.refuse_unknown(words)
            if self._check_overrides is not None:
                self._check_overrides(overrides)
        options = super().parse_args(words, namespace)
        if self._check_overrides is not None:
            options.overrides = overrides
        return options

    def print_help(self, file: Any = None) -> None:
        prepare_streams()
        super().print_help(file)
        flush_output()

    def error(self, message: str) -> NoReturn:
        message = _LONG_WORD.sub(r"\1...", message.removeprefix("argument "))
        raise UserError(f"{printable(message)}; see --help")

    def _take_overrides(self, words: list[str]) -> tuple[list[str], list[str]]:
        """(other words, overrides)."""
        others: list[str] = []
        overrides: list[str] = []
        while words:
            word = words.pop(0)
            if word == "--":
                return others, overrides + words
            if not (match := _OVERRIDE.fullmatch(word)):
                others.append(word)
                continue
            overrides.append(word)
            if match[1] is None and words and not self.is_option(words[0]):
                overrides.append(words.pop(0))
        return others, overrides

    def is_option(self, word: str) -> bool:
        """Whether a word begins an option or an override."""
        return word == "--" or word.partition("=")[0] in self._option_string_actions or bool(_OVERRIDE.fullmatch(word))

    def refuse_unknown(self, words: Iterable[str]) -> None:
        """Refuse the first option that this parser does not know, with the nearest one that it does."""
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            if len(word) < 2 or word[0] != "-" or " " in name or _NEGATIVE_NUMBER.match(word):
                continue
            if name in self._option_string_actions:
                continue
            if near := nearest(name, self._option_string_actions):
                self.error(f"{name} is unknown; did you mean {near}?")
            if self._check_overrides is not None:
                self.error(f"{word!r} is not understood; overrides are written --section.field value")
            self.error(f"{name} is unknown")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = nearest(str(value), map(str, action.choices))
            hint = f"; did you mean {near}?" if near else ""
            known = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value!r} is not one of {known}{hint}")


class _Gather(argparse.Action):
    """A list of values; an option that is given again adds to it, and the first replaces the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is self.default else before), *values])


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was most likely meant: one that begins so, or that is spelt nearly so."""
    known, word = list(known), word[:80].lower().replace("_", "-")
    begun = [name for name in known if len(word) > 2 and name.startswith(word)]
    return next(iter(begun or difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def printable(text: str) -> str:
    """The text with line ends and other characters that do not print escaped: it stays one line."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def whole(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes a whole number within bounds."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            value = int(text)
            if least <= value and (most is None or value <= most):
                return value
        bounds = f"from {least} up" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")

    return read


def number(least: float = 0.0, most: float = math.inf) -> Callable[[str], float]:
    """The type of an option that takes a finite number within bounds, both allowed."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if least <= value <= most and math.isfinite(value):
                return value
        bounds = f"from {least:g} up" if most == math.inf else f"from {least:g} to {most:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {bounds}")

    return read


def positive(text: str) -> float:
    """The type of an option that takes a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def file_path(text: str) -> Path:
    """The type of an option that names a file or directory; an empty word would be the current directory."""
    return Path(nonempty(text))


def nonempty(text: str) -> str:
    """The type of an option that takes a name or a prefix, which cannot be empty."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty; give a name, or leave the option out")
    return text
