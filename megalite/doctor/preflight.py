"""The preflight of a job: every rank checks its own machine, then all of them what they share.

Ranks connect to a TCP store on rank 0's node before any process group exists, so that a missing rank is named where
NCCL or gloo would only time out. Each rank sends its findings to rank 0 through the store; rank 0 compares them,
reports, and gives all ranks the same verdict.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store

from megalite.affinity import own_cores
from megalite.config import Config, check, parse_command_line
from megalite.config.sources import parse_sources
from megalite.data.indexed import IndexedDataset
from megalite.doctor.findings import FAULT, OK, WARNING, Finding, TimeLimit, healthy, rows
from megalite.doctor.gpus import look_at_gpus
from megalite.doctor.machine import (
    devices_here,
    look_at_cores,
    look_at_devices,
    look_at_disk,
    look_at_limits,
    look_at_software,
    versions,
)
from megalite.doctor.network import look_at_collectives
from megalite.errors import UNUSABLE, UserError
from megalite.model.cost import parameter_count
from megalite.observe.formatting import counted
from megalite.rendezvous import open_store
from megalite.runtime import World

_BYTES_A_PARAMETER = 12
"""A checkpoint's fp32 weight and two fp32 moments."""
_SLOW = {"gpu": 0.90, "cpu": 0.60}
"""A device below this share of the median rate is slow. CPU cores may be busy with something else at the moment: that
is told, and no fault of the node."""
_SLOW_LINK = 0.5
_CLOCK_SKEW = 5.0
_SHARE_SECONDS = 30.0
_FAREWELL_SECONDS = 0.5
"""The store lives in rank 0: the others read the verdict before it ends."""
_MEET_SHARE, _FILE_SHARE, _READY_SHARE, _WORK_SHARE = 0.3, 0.45, 0.6, 0.9
"""Of the time limit: until all have come, have seen rank 0's file, are ready for the collectives, have reported."""


def preflight(arguments: Sequence[str], limit: TimeLimit) -> tuple[list[Finding], bool]:
    """Check this rank and, on rank 0, all of them. (findings on rank 0, none elsewhere; whether the job is healthy).

    Raises UserError for an unusable recipe, on rank 0; the others leave with the same exit code.
    """
    world = World.from_environment()
    host = socket.gethostname()
    limit.where = f"rank {world.rank} ({host})"
    try:
        config = parse_command_line(list(arguments), "python tools/doctor.py --preflight").config
        on_mesh = _fits(config, world)
    except UserError:
        if world.rank:
            time.sleep(2.0)  # rank 0 reports for all
            sys.exit(UNUSABLE)
        raise
    try:
        return _meet_and_examine(config, world, host, limit, on_mesh)
    except (RuntimeError, TimeoutError, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        remedy = f"is rank 0 alive, and {address} within reach (name resolution, firewall)?"
        print(Finding(FAULT, limit.check, limit.where, f"rank 0 is lost: {said[0][:160]}", remedy), flush=True)
        return [], False


def _meet_and_examine(
    config: Config, world: World, host: str, limit: TimeLimit, on_mesh: bool
) -> tuple[list[Finding], bool]:
    limit.check = "meeting of the ranks"
    meeting = open_store(world.rank, world.size, timedelta(seconds=_MEET_SHARE * limit.seconds))
    store = PrefixStore("megalite/doctor", meeting)
    store.set(f"here/{world.rank}", host)
    if missing := _missing(store, world, "here", limit, _MEET_SHARE):
        if world.rank:
            return [], False
        time.sleep(_FAREWELL_SECONDS)
        remedy = "look at the logs of their nodes: did the tasks start, can they reach rank 0?"
        return [Finding(FAULT, limit.check, _ranks(missing), "did not come", remedy)], False
    report = _examine(config, world, host, store, limit, on_mesh)
    store.set(f"report/{world.rank}", json.dumps(report))
    limit.check = "waiting for the others"
    if world.rank:
        store.wait(["verdict"], timedelta(seconds=limit.seconds))
        return [], store.get("verdict") == b"1"
    prompt = [rank for rank in range(world.size) if rank not in report["late"]]
    missing = report["late"] + _absent(store, "report", prompt, limit.at(_WORK_SHARE))
    reports = {rank: json.loads(store.get(f"report/{rank}")) for rank in range(world.size) if rank not in missing}
    findings = compare(reports)
    for rank in missing:
        where = f"rank {rank} ({store.get(f'here/{rank}').decode()})"
        findings.append(Finding(FAULT, "checks", where, "did not finish", "look at this node: it hangs or is slow"))
    verdict = healthy(findings)
    store.set("verdict", str(int(verdict)))
    time.sleep(_FAREWELL_SECONDS)
    return findings, verdict


def _fits(config: Config, world: World) -> bool:
    """Whether each rank of the recipe's mesh has its own process; else there is one process a node, and no mesh."""
    nodes = int(os.environ.get("SLURM_NNODES", "0"))
    if world.size == nodes and world.size % config.model_parallel:
        return False
    check(config, world.size)
    return True


def _missing(store: Store, world: World, name: str, limit: TimeLimit, share: float) -> list[int]:
    """The ranks that have not set their key after that share of the time limit, determined by rank 0 for all."""
    if world.rank == 0:
        store.set(f"missing {name}", json.dumps(_absent(store, name, range(world.size), limit.at(share))))
    store.wait([f"missing {name}"], timedelta(seconds=limit.seconds))
    return json.loads(store.get(f"missing {name}"))


def _absent(store: Store, name: str, ranks: Iterable[int], deadline: float) -> list[int]:
    """Those of the ranks that have not set their key when all have, or when the time is over."""
    missing = list(ranks)
    while missing:
        missing = [rank for rank in missing if not store.check([f"{name}/{rank}"])]
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return missing


def _examine(config: Config, world: World, host: str, store: Store, limit: TimeLimit, on_mesh: bool) -> dict[str, Any]:
    """What one rank finds. What belongs to the node is left to the first rank on it."""
    findings: list[Finding] = []
    report: dict[str, Any] = {"host": host, "versions": versions(), "time": time.time(), "links": {}, "late": []}
    report["cores"] = sorted(own_cores())
    run_dir = Path(config.run.dir)
    gpus = config.run.device != "cpu"

    def look(name: str, action: Callable[[], None]) -> None:
        limit.check = name
        try:
            action()
        except (OSError, RuntimeError, UserError, ValueError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            findings.append(Finding(FAULT, name, f"rank {world.rank} ({host})", said[0][:200], "see what it says"))

    def node() -> None:
        findings.extend([*look_at_software(host), *look_at_limits(host)])
        needed = _BYTES_A_PARAMETER * parameter_count(config.model) * (max(config.checkpoint.keep, 1) + 1)
        findings.extend(look_at_disk(host, run_dir, needed if config.model.vocab_size else 0))
        if gpus:
            expected = int(os.environ.get("SLURM_GPUS_ON_NODE", "0") or 0) or None
            found, common = look_at_gpus(host, expected)
            findings.extend(found)
            report["versions"].update(common)

    def devices() -> None:
        here = devices_here(gpus)
        own = here[world.local_rank % len(here) :][:1] if on_mesh else here
        found, report["rates"] = look_at_devices(host, own)
        findings.extend(found)

    if world.local_rank == 0:
        look("node", node)
    look("shared file system", lambda: findings.extend(_look_for_token(run_dir, world, host, store, limit)))
    if world.local_rank == 0:
        look("data", lambda: findings.extend(_look_at_data(config, host, report)))
    look("matmul", devices)
    if world.size > 1:
        limit.check = "waiting for the others"
        store.set(f"ready/{world.rank}", "1")
        report["late"] = _missing(store, world, "ready", limit, _READY_SHARE)
    if world.size > 1 and not report["late"]:  # a collective would wait for a hung rank without naming it
        found, report["links"] = look_at_collectives(config, world, host, store, limit, on_mesh)
        findings.extend(found)
    return report | {"findings": rows(findings)}


def _look_for_token(run_dir: Path, world: World, host: str, store: Store, limit: TimeLimit) -> list[Finding]:
    """Rank 0 writes a file under run.dir; every other rank must read it there."""
    path = run_dir / ".megalite-doctor-token"
    if world.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(16)
        path.write_text(token)
        store.set("token", token)
        store.set("token/0", "1")
        deadline = min(time.monotonic() + 2 * _SHARE_SECONDS, limit.at(_FILE_SHARE))
        _absent(store, "token", range(world.size), deadline)
        path.unlink(missing_ok=True)
        return []
    store.wait(["token"], timedelta(seconds=_SHARE_SECONDS))
    token, deadline = store.get("token").decode(), time.monotonic() + _SHARE_SECONDS
    seen = False
    while not seen and time.monotonic() < deadline:
        try:
            seen = os.path.isdir(run_dir) and path.read_text() == token
        except OSError:
            seen = False
        if not seen:
            time.sleep(0.2)
    store.set(f"token/{world.rank}", "1")
    if seen:
        return []
    remedy = "run.dir must be on a file system that all nodes share: mount it, or choose another"
    where = f"rank {world.rank} ({host})"
    return [Finding(FAULT, "shared file system", where, f"rank 0's file in {run_dir} is not seen", remedy)]


def _look_at_data(config: Config, host: str, report: dict[str, Any]) -> list[Finding]:
    """Open every token file and the tokenizer; their fingerprints are compared between nodes."""
    findings, report["data"] = [], {}
    sources = [*parse_sources(config.data.train, "data.train"), *parse_sources(config.data.valid, "data.valid")]
    for prefix in dict.fromkeys(source.prefix for source in sources):
        try:
            dataset = IndexedDataset(Path(prefix))
            report["data"][prefix] = dataset.fingerprint()
            findings.append(Finding(OK, "data", host, f"{prefix}: {counted(len(dataset), 'sequence')}"))
        except (UserError, OSError) as error:
            remedy = "copy the token file there, or mend data.train and data.valid"
            findings.append(Finding(FAULT, "data", host, str(error), remedy))
    tokenizer = config.data.tokenizer
    if tokenizer and tokenizer != "byte" and not Path(tokenizer).exists():
        findings.append(Finding(FAULT, "data", host, f"data.tokenizer {tokenizer} does not exist", "copy it there"))
    return findings


def compare(reports: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
    """All ranks' findings and those from comparing ranks; faults of a node are reported once."""
    findings = [Finding.read(row) for report in reports.values() for row in report["findings"]]
    findings += _compare_facts("versions", reports, "install the same everywhere")
    findings += _compare_facts("data", reports, "the files differ: copy them again")
    median = statistics.median_low(report["time"] for report in reports.values())
    for rank, report in reports.items():
        if abs(report["time"] - median) > _CLOCK_SKEW:
            skew = report["time"] - median
            where = f"rank {rank} ({report['host']})"
            findings.append(Finding(WARNING, "clock", where, f"{skew:+.0f} s from the others", "start an NTP client"))
    rates = {
        f"{report['host']} {device} (rank {rank})": rate
        for rank, report in reports.items()
        for device, rate in report.get("rates", {}).items()
    }
    findings += compare_rates(rates)
    findings += _compare_cores(reports)
    findings += _compare_links(reports)
    return list(dict.fromkeys(findings))


def _compare_facts(name: str, reports: Mapping[int, Mapping[str, Any]], remedy: str) -> list[Finding]:
    """Name the nodes whose value of a fact is not that of most others."""
    findings = []
    by_host: dict[str, dict[str, str]] = defaultdict(dict)
    for report in reports.values():
        by_host[report["host"]].update(report.get(name, {}))
    for key in dict.fromkeys(key for facts in by_host.values() for key in facts):
        values = {host: facts[key] for host, facts in by_host.items() if key in facts}
        usual = Counter(values.values()).most_common(1)[0][0]
        for host, value in values.items():
            if value != usual:
                found = f"{key} {value}, elsewhere {usual}" if name == "versions" else f"{key} is not as elsewhere"
                findings.append(Finding(FAULT, name, host, found, remedy))
    if len(by_host) > 1 and not findings:
        findings.append(Finding(OK, name, counted(len(by_host), "node"), "the same on all"))
    return findings


def _compare_cores(reports: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
    """The cores that the ranks of a node have between them, whether shared or each its own, against its GPUs."""
    cores: dict[str, set[int]] = defaultdict(set)
    gpus: dict[str, set[str]] = defaultdict(set)
    for report in reports.values():
        cores[report["host"]].update(report.get("cores", ()))
        gpus[report["host"]].update(name for name in report.get("rates", {}) if name.startswith("gpu"))
    return [finding for host in gpus for finding in look_at_cores(host, len(cores[host]), len(gpus[host]))]


def compare_rates(rates: Mapping[str, float]) -> list[Finding]:
    """Name the devices that multiply much slower than the median of their kind."""
    findings = []
    for kind, share in _SLOW.items():
        own = {where: rate for where, rate in rates.items() if f" {kind}" in where}
        if len(own) < 2:
            continue
        median = statistics.median_high(own.values())
        for where, rate in own.items():
            if rate < share * median:
                found = f"slow: {rate:,.3g} TFLOP/s, {rate / median:.0%} of the median"
                remedy = (
                    "other processes, heat or a power limit: nvidia-smi -q -d PERFORMANCE tells; or exclude the node"
                )
                findings.append(Finding(FAULT if kind == "gpu" else WARNING, "matmul", where, found, remedy))
    return findings


def _compare_links(reports: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
    """Sum up the bandwidth of each axis, and name the groups that are much slower than their like."""
    groups: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
    for report in reports.values():
        for axis, link in report.get("links", {}).items():
            ranks = tuple(link["ranks"])
            groups[axis][ranks] = min(link["gigabytes_per_second"], groups[axis].get(ranks, float("inf")))
    findings = []
    on_gpus = any(name.startswith("gpu") for report in reports.values() for name in report.get("rates", {}))
    for axis, rates in groups.items():
        median = statistics.median_high(rates.values())
        size = len(next(iter(rates)))
        value = f"{axis}: sums correct, {median:,.3g} GB/s (bus) in {counted(len(rates), 'group')} of {size}"
        findings.append(Finding(OK, "collectives", "all ranks", value))
        for ranks, rate in rates.items():
            if rate < _SLOW_LINK * median:
                hosts = ", ".join(sorted({str(reports[rank]["host"]) for rank in ranks if rank in reports}))
                found = f"{axis}: {rate:,.3g} GB/s, {rate / median:.0%} of the median"
                remedy = "a slow link or cable: check the network of these nodes, or exclude them"
                level = FAULT if on_gpus else WARNING
                findings.append(Finding(level, "collectives", f"{_ranks(ranks)} ({hosts})", found, remedy))
    return findings


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
