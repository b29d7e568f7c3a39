"""Candidates that were never proven on a device are tried in a process of their own, before `auto` may measure them.

A wrong kernel may do more than give wrong numbers: one that waits for a barrier which nobody reaches never ends, and
one that reads beyond its memory ends every later call of its process. So a child computes each kind of call and
compares it with the reference; a kind is admitted by the child's answer, and a child that dies or takes too long admits
no more.

    python -m megalite.kernels.attention.trial NAME DEVICE < calls.json

reads a list of `Call`s and prints a line of JSON for each.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from .agreement import disagreement
from .call import Call

UNPROVEN = ("gluon",)
"""Candidates that have never run on a GPU. One leaves this list when its tests have passed on a device."""
SECONDS = 180.0
"""For all kinds of call together: a start of Python and torch, and a compilation of 10 to 20 seconds for each kind."""

logger = logging.getLogger("megalite.kernels")


def admitted(name: str, calls: Sequence[Call], device: torch.device, seconds: float = SECONDS) -> set[Call]:
    """Those of `calls` for which a child found that the candidate agrees; why not, goes to the log."""
    if not calls:
        return set()
    given = json.dumps([{**asdict(call), "dtype": str(call.dtype).removeprefix("torch.")} for call in calls])
    command = [sys.executable, "-m", __name__, name, str(device)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    printed: str | bytes
    try:
        child = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=seconds, env=environment, check=False
        )
        printed, ended = child.stdout, f"its trial ended with status {child.returncode}: {_last_line(child.stderr)}"
    except subprocess.TimeoutExpired as error:  # which holds bytes
        printed, ended = error.stdout or "", f"its trial took more than {seconds:.0f} seconds"
    faults = _answers(printed)
    for number, call in enumerate(calls):
        fault = faults.get(number, ended)
        if fault is not None:
            logger.warning("kernels.attention: %s is left out for %s: %s", name, call.name(device), fault)
    return {call for number, call in enumerate(calls) if faults.get(number, ended) is None}


def _answers(printed: str | bytes) -> dict[int, str | None]:
    """Number of the call -> what is wrong with it, or None; a last line that was cut off is none."""
    found: dict[int, str | None] = {}
    for line in printed.splitlines():
        try:
            answer = json.loads(line)
            found[answer["call"]] = answer["fault"]
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:200]


def main(name: str, where: str) -> int:
    from ..dispatch import attention_candidates

    device = torch.device(where)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    candidate = attention_candidates(device)[name]
    for number, fields in enumerate(json.load(sys.stdin)):
        call = Call(**{**fields, "dtype": getattr(torch, fields["dtype"])})
        try:
            with torch.enable_grad() if call.gradients else torch.no_grad():
                fault = disagreement(candidate, *call.example(device))
        except Exception as error:
            fault = (str(error) or type(error).__name__).splitlines()[0][:200]
        print(json.dumps({"call": number, "fault": fault}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
