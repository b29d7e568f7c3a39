"""A finding is one line: severity, what was checked, where, the result, the remedy."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

OK, WARNING, FAULT = "ok", "warning", "fault"
_ORDER = {FAULT: 0, WARNING: 1, OK: 2}


@dataclass(frozen=True)
class Finding:
    """`where` names the node, GPU or rank; `remedy` is empty if nothing is to be done."""

    level: str
    check: str
    where: str
    value: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<7}  {self.where:<14}  {self.check}: {self.value}" + (
            f"; {self.remedy}" if self.remedy else ""
        )

    @staticmethod
    def read(row: Mapping[str, Any]) -> Finding:
        return Finding(*(str(row[name]) for name in ("level", "check", "where", "value", "remedy")))


def rows(findings: Iterable[Finding]) -> list[dict[str, str]]:
    return [asdict(finding) for finding in findings]


def sort(findings: Iterable[Finding]) -> list[Finding]:
    """Faults first; otherwise in the order in which things were looked at."""
    return sorted(findings, key=lambda finding: _ORDER[finding.level])


def healthy(findings: Iterable[Finding]) -> bool:
    return all(finding.level != FAULT for finding in findings)


class TimeLimit:
    """Ends the process, with a finding, when a check does not end: a driver may hang in the kernel."""

    def __init__(self, where: str, seconds: float) -> None:
        self.where, self.seconds, self.check = where, seconds, "start"
        self._began = time.monotonic()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def at(self, share: float) -> float:
        """When (`time.monotonic`) that share of the time is over."""
        return self._began + share * self.seconds

    def _expire(self) -> NoReturn:
        found = f"not finished after {self.seconds:.0f} s"
        print(
            Finding(FAULT, self.check, self.where, found, "look at this node; --time-limit sets the limit"), flush=True
        )
        sys.stdout.flush()
        os._exit(1)

    def cancel(self) -> None:
        self._timer.cancel()
