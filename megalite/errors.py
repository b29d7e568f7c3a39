"""How megalite's programs end: exit codes, and the one-line errors for users.

The only home of the exit codes: `launch/entry.sh` and `launch/job.sh`, which cannot import, are tested to agree.
"""

import sys
from typing import NoReturn

FINISHED, FAULT, UNUSABLE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Done; anything unforeseen; a user's mistake; stopped on request with a checkpoint; Ctrl-C."""

ENDINGS = {FINISHED: "finished", UNUSABLE: "refused", STOPPED: "stopped on request", INTERRUPTED: "interrupted"}
"""Descriptions of the exit codes that are not faults."""


class UserError(Exception):
    """A mistake that the user can mend: the message names the field or file, its value, and what would be right."""


class CommonError(UserError):
    """A `UserError` that every rank of a run raises at the same point: the ranks can still act together."""


class RunFailed(Exception):
    """The run cannot go on, for a known reason that every rank found: one line without a trace, exit code 1."""


class Diverged(RunFailed):
    """Loss or gradients are beyond recovery."""


class NotSaved(RunFailed):
    """The last checkpoint could not be written."""


def fail(message: str, code: int = UNUSABLE) -> NoReturn:
    """Print one line on standard error and leave."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
