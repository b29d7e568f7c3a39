"""A conversation in the terminal: one line is a message, and the answer appears as it is written."""

from __future__ import annotations

import contextlib
import sys
import threading

from megalite.chat.interrupt import on_interrupt
from megalite.chat.speaker import Speaker, opening
from megalite.errors import UserError

_COMMANDS = "/reset (a new conversation), /exit"


def talk(speaker: Speaker, system: str) -> None:
    """Rank 0: read messages from standard input until it ends or the user leaves."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (arrow keys and history in `input`)
        print(f"Commands: {_COMMANDS}. Ctrl-C stops an answer.")
    messages, told = opening(system), 0
    while True:
        line = speaker.waiting(lambda: _read(interactive))
        if line is None or line == "/exit":
            return
        if line == "/reset":
            messages, told = opening(system), 0
            print("A new conversation begins.", flush=True)
            continue
        if line.startswith("/"):
            print(f"{line.split()[0]} is not a command; there are {_COMMANDS}", flush=True)
            continue
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            prompt = speaker.prompt(asked)
        except UserError as error:
            print(f"error: {error}", flush=True)
            continue
        if prompt.left_out > told:
            told = prompt.left_out
            print(f"(The conversation is too long for the model: the first {told} messages are left out.)")
        stop = threading.Event()
        with on_interrupt(stop.set):
            completion = speaker.answer(prompt, _show, stop)
        print({"length": " (cut off)", "interrupted": " (stopped)"}.get(completion.reason, ""), flush=True)
        messages = [*asked, {"role": "assistant", "content": completion.text}]


def _read(interactive: bool) -> str | None:
    """The next line; None at the end of the input."""
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        return None


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
