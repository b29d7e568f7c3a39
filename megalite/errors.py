"""How megalite's programs end: the exit codes, and the one line that tells users what is wrong."""

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

FINISHED, FAULT, UNUSABLE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Done; anything unforeseen; a user's mistake; stopped on request with a checkpoint; Ctrl-C."""

Result = TypeVar("Result")


class UserError(Exception):
    """A mistake that the user can mend: the message names the field or file, its value, and what would be right."""


def fail(message: str) -> NoReturn:
    """Print one line on standard error and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(UNUSABLE)


def exit_on_user_error(main: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a program's `main`: a `UserError` becomes its one line and exit code 2, Ctrl-C becomes exit code 130."""

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> Result:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(INTERRUPTED) from None

    return guarded
