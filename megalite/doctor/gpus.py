"""GPU checks through nvidia-smi: clocks and throttling, memory errors, links, foreign processes."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from megalite.doctor.findings import FAULT, OK, WARNING, Finding

_TIMEOUT_SECONDS = 60.0
_REQUIRED = (
    "index", "name", "driver_version", "temperature.gpu", "clocks.sm", "clocks.max.sm", "memory.used", "memory.total",
    "power.draw", "power.limit", "pcie.link.width.current", "pcie.link.width.max",
)  # fmt: skip
_OPTIONAL = (
    ("ecc.mode.current", "ecc.errors.uncorrected.volatile.total"),
    ("retired_pages.pending",),
    ("mig.mode.current",),
)
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The newer and the older name of the same bits."""
_SLOWDOWNS = {0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}
"""Bits of NVML's clock event reasons that a healthy idle GPU never shows."""
_HOT_CELSIUS = 85.0
_STRANGER_MIB = 2048.0


class Smi:
    """One node's nvidia-smi; `rows` maps fields to values, None if the GPU does not have the field."""

    def __init__(self) -> None:
        self.program = shutil.which("nvidia-smi")
        self.fault = ""
        self.rows: list[dict[str, str | None]] = []
        if self.program is None:
            return
        self.rows = self._query(_REQUIRED)
        for fields in _OPTIONAL:
            self._join(self._query(fields, needed=False))
        for field in _REASONS:
            extra = self._query((field,), needed=False)
            if extra:
                self._join([{"reasons": row[field]} for row in extra])
                break

    def _join(self, extra: Sequence[dict[str, str | None]]) -> None:
        for row, more in zip(self.rows, extra):
            row.update(more)

    def _query(self, fields: Sequence[str], needed: bool = True) -> list[dict[str, str | None]]:
        """One row a GPU; an unknown field makes nvidia-smi refuse the whole query."""
        assert self.program is not None
        if self.fault:
            return []
        command = [self.program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            self.fault = f"no answer within {_TIMEOUT_SECONDS:.0f} s"
            return []
        except OSError as error:
            self.fault = str(error.strerror)
            return []
        if done.returncode:
            if needed:
                self.fault = (
                    (done.stdout + done.stderr).strip().splitlines()[0][:200]
                    if done.stdout + done.stderr
                    else (f"exit code {done.returncode}")
                )
            return []
        return [dict(zip(fields, map(_value, line))) for line in csv.reader(done.stdout.splitlines()) if line]


def _value(text: str) -> str | None:
    text = text.strip()
    return None if text.startswith("[") or text in ("", "N/A") else text


def _number(row: dict[str, str | None], field: str) -> float | None:
    try:
        return float(row.get(field) or "")
    except ValueError:
        return None


def look_at_gpus(host: str, expected: int | None = None) -> tuple[list[Finding], dict[str, str]]:
    """Findings of one node, and what must be equal on all nodes (driver, GPU name).

    There must be `expected` GPUs, if known.
    """
    smi = Smi()
    if smi.program is None:
        if expected:
            remedy = "nvidia-smi is not on the path: is this a GPU node, with its driver installed?"
            return [Finding(FAULT, "GPUs", host, f"none, {expected} expected", remedy)], {}
        return [Finding(OK, "GPUs", host, "none (no nvidia-smi)")], {}
    if smi.fault:
        remedy = "the driver does not work: reboot or drain the node"
        return [Finding(FAULT, "nvidia-smi", host, smi.fault, remedy)], {}
    findings = list(_judge_count(host, smi, expected))
    for row in smi.rows:
        findings += _judge(host, row)
    names = {row["name"] or "?" for row in smi.rows}
    common = {"GPU": ", ".join(sorted(names)), "driver": (smi.rows[0]["driver_version"] or "?") if smi.rows else "none"}
    return findings, common


def _judge_count(host: str, smi: Smi, expected: int | None) -> Iterator[Finding]:
    names = sorted({row["name"] or "?" for row in smi.rows})
    value = f"{len(smi.rows)} x {' and '.join(names)}" if names else "none"
    if expected and len(smi.rows) < expected:
        remedy = "a GPU has fallen off the bus (dmesg shows Xid errors): reboot or drain the node"
        yield Finding(FAULT, "GPUs", host, f"{value}, {expected} expected", remedy)
    elif len(names) > 1:
        yield Finding(WARNING, "GPUs", host, value, "the slowest kind sets the pace of all")
    else:
        yield Finding(OK, "GPUs", host, value)


def _judge(host: str, row: dict[str, str | None]) -> Iterator[Finding]:
    """The faults of one GPU, or a one-line summary if it has none."""
    where = f"{host} gpu {row['index']}"
    found: list[Finding] = []
    errors = _number(row, "ecc.errors.uncorrected.volatile.total")
    if errors:
        remedy = "reset the GPU or drain the node: memory errors end jobs and may damage weights"
        found.append(
            Finding(FAULT, "ECC", where, f"{errors:.0f} uncorrected memory errors since the last reset", remedy)
        )
    if (row.get("retired_pages.pending") or "").lower() in ("yes", "pending"):
        found.append(
            Finding(FAULT, "ECC", where, "memory pages wait for retirement", "reset the GPU or drain the node")
        )
    if (row.get("ecc.mode.current") or "").lower() == "disabled":
        found.append(Finding(WARNING, "ECC", where, "off", "nvidia-smi -e 1 and a reset switch it on"))
    if (row.get("mig.mode.current") or "").lower() == "enabled":
        found.append(Finding(WARNING, "MIG", where, "on", "a slice trains slowly; whole GPUs need MIG off"))
    bits = int(row.get("reasons") or "0", 16)
    slow = sorted({reason for bit, reason in _SLOWDOWNS.items() if bits & bit})
    clock, full = _number(row, "clocks.sm"), _number(row, "clocks.max.sm")
    if slow:
        value = f"held at {clock or 0:.0f} of {full or 0:.0f} MHz by {', '.join(slow)}"
        found.append(Finding(FAULT, "clocks", where, value, "check cooling and power, or drain the node"))
    heat = _number(row, "temperature.gpu")
    if heat is not None and heat > _HOT_CELSIUS:
        found.append(Finding(WARNING, "temperature", where, f"{heat:.0f} C", "check the node's cooling"))
    used = _number(row, "memory.used")
    if used is not None and used > _STRANGER_MIB:
        value = f"{used / 1024:.1f} of {(_number(row, 'memory.total') or 0) / 1024:.0f} GiB in use before the run"
        found.append(Finding(WARNING, "memory", where, value, "another process is there: nvidia-smi names it"))
    width, widest = _number(row, "pcie.link.width.current"), _number(row, "pcie.link.width.max")
    if width and widest and width < widest:
        found.append(
            Finding(WARNING, "PCIe", where, f"x{width:.0f} of x{widest:.0f}", "reseat the card or drain the node")
        )
    if not found:
        power = f"{_number(row, 'power.draw') or 0:.0f} of {_number(row, 'power.limit') or 0:.0f} W"
        value = f"{heat or 0:.0f} C, {clock or 0:.0f} of {full or 0:.0f} MHz, {power}, no uncorrected errors"
        found.append(Finding(OK, "health", where, value))
    yield from found
