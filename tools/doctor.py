"""What this machine or node can do, and what is wrong with it.

python tools/doctor.py [--run-dir DIR] [--json]
srun python tools/doctor.py --preflight RECIPE.toml [--section.field value ...]

Alone it looks at one machine. As a preflight it runs on every node of a job (srun or torchrun, one process a node or
one a GPU) and looks at what they must share as well: versions, file system, data files, the collectives along every
axis of the recipe's mesh, and which of them is slow. Exit code 0: healthy; 1: something is wrong, one line for each
finding with node or rank, value and remedy; 2: unusable arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import threading
from pathlib import Path

from megalite.affinity import own_cores
from megalite.cli import Parser, file_path, nonempty, program
from megalite.config.load import parse_overrides
from megalite.doctor.findings import WARNING, Finding, TimeLimit, healthy, rows, sort
from megalite.doctor.gpus import look_at_gpus
from megalite.doctor.machine import (
    devices_here,
    look_at_cores,
    look_at_devices,
    look_at_disk,
    look_at_limits,
    look_at_software,
)
from megalite.doctor.preflight import compare_rates, preflight
from megalite.errors import UserError
from megalite.observe.formatting import counted


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= threading.TIMEOUT_MAX:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a time; give seconds above 0")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, overrides=parse_overrides)
    add = parser.add_argument
    add("--run-dir", type=file_path, default=Path("runs"), metavar="DIR", help="where runs are to live (default: runs)")
    add("--preflight", type=nonempty, metavar="RECIPE", help="check all nodes of a job for this recipe")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    add("--time-limit", type=_seconds, default=300.0, metavar="SECONDS", help="for everything (300)")
    options = parser.parse_args(arguments)
    if options.overrides and not options.preflight:
        raise UserError(f"{options.overrides[0]} changes a recipe; give --preflight RECIPE as well")
    return options


def examine(run_dir: Path) -> list[Finding]:
    """Everything about this machine."""
    host = socket.gethostname()
    findings = [*look_at_software(host), *look_at_limits(host), *look_at_disk(host, run_dir)]
    findings += look_at_gpus(host)[0]
    products, rates = look_at_devices(host, devices_here())
    findings += look_at_cores(host, len(own_cores()), sum(name.startswith("gpu") for name in rates))
    return findings + products + compare_rates({f"{host} {name}": rate for name, rate in rates.items()})


def show(findings: list[Finding], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"healthy": healthy(findings), "findings": rows(findings)}))
        return
    for finding in sort(findings):
        print(finding)
    warnings = sum(finding.level == WARNING for finding in findings)
    if not healthy(findings):
        print("something is wrong: see above")
    else:
        print("healthy" + (f", {counted(warnings, 'warning')}" if warnings else ""))


@program
def main() -> int:
    options = parse(sys.argv[1:])
    limit = TimeLimit(socket.gethostname(), options.time_limit)
    try:
        if options.preflight:
            findings, verdict = preflight([options.preflight, *options.overrides], limit)
        else:
            limit.check = "this machine"
            findings = examine(options.run_dir)
            verdict = healthy(findings)
    finally:
        limit.cancel()
    if findings:
        show(findings, options.json)
    return 0 if verdict else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread of a backend that waits for a dead peer must not keep the node
