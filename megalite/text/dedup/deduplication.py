"""Deduplicating a corpus, stage by stage: digests, exact copies, sketches, candidates, clusters, shards.

The input is read three times and never held: once for digests, once for the sketches of what is not an exact copy,
once to write what stays. Between stages everything that grows with the corpus is on disk (see `store`); in memory
there are only the documents that are dropped (24 bytes each) and one range of keys in each worker.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megalite.errors import UserError
from megalite.text.dedup.clusters import Keep, drop_near_copies
from megalite.text.dedup.contamination import Benchmarks, read_benchmarks
from megalite.text.dedup.exact import DigestTask, ExactTask, digest_unit, exact_copies
from megalite.text.dedup.minhash import Banding
from megalite.text.dedup.near import SIMILARITY_BINS, CandidateTask, SketchTask, sketch_unit, verify_candidates
from megalite.text.dedup.store import SortedRun, Store, key_ranges, layout_runs
from megalite.text.jobs import DONE_DIRECTORY, Unit, fingerprint, map_tasks, noted, plan_units
from megalite.text.records import MAX_RECORD_BYTES
from megalite.text.shards import Unusable, open_output, open_shards, read_unit

REASONS = ("exact_duplicate", "near_duplicate", "contaminated")


@dataclass(frozen=True)
class Settings:
    """What decides the output."""

    threshold: float
    banding: Banding
    ngram: int = 5
    keep: Keep = "first"
    key: str = "text"
    decontaminate: tuple[str, ...] = ()
    decontaminate_key: str = "text"
    decontaminate_ngram: int = 13
    keep_rejected: bool = False
    max_bad_ratio: float = 0.01
    allow_damaged: bool = False
    max_record_bytes: int = MAX_RECORD_BYTES


@dataclass
class DedupSummary:
    """What deduplication did; the content of report.json."""

    documents: int = 0
    characters: int = 0
    kept: int = 0
    kept_characters: int = 0
    removed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    clusters: int = 0
    cluster_sizes: dict[int, int] = field(default_factory=dict)
    compared_pairs: int = 0
    similarity_histogram: list[int] = field(default_factory=list)
    bands: int = 0
    rows: int = 0
    threshold: float = 0.0
    expected_recall_at_threshold: float = 0.0
    benchmark_items: int = 0
    benchmark_items_too_short: int = 0
    unusable: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Deduplication:
    """One run over one corpus; `run` calls the stages in order. Each stage leaves what the next one reads on disk."""

    def __init__(self, paths: list[Path], output: Path, settings: Settings, workers: int, memory: int) -> None:
        """`memory`: bytes that each worker may take for sorting."""
        self.output, self.settings, self.workers, self.memory = output, settings, workers, memory
        self.units = plan_units(paths)
        self.weights = [unit.bytes for unit in self.units]
        self.benchmarks: Benchmarks | None = None
        if settings.decontaminate:
            files = [Path(path) for path in settings.decontaminate]
            self.benchmarks = read_benchmarks(files, settings.decontaminate_key, settings.decontaminate_ngram)
        self.summary = DedupSummary(
            bands=settings.banding.bands,
            rows=settings.banding.rows,
            threshold=settings.threshold,
            expected_recall_at_threshold=settings.banding.recall(settings.threshold),
        )
        self.runs: list[SortedRun] = []
        benchmarks = hashlib.sha256(self.benchmarks.hashes.tobytes()).hexdigest() if self.benchmarks else ""
        self._fingerprint = fingerprint(self.units, [asdict(settings), benchmarks])

    def is_finished(self) -> bool:
        """Whether the output directory holds the complete result of this very run."""
        open_output(self.output, self._fingerprint)
        return (self.output / "report.json").is_file()

    def run(self) -> DedupSummary:
        """Do all stages that are still to be done.

        Raises:
            UserError: unusable input or output directory, or input that changes while it is read.
        """
        open_output(self.output, self._fingerprint)
        if self.benchmarks:
            self.benchmarks.save(self.output / DONE_DIRECTORY)
            self.summary.benchmark_items = len(self.benchmarks.items)
            self.summary.benchmark_items_too_short = self.benchmarks.too_short
        self._timed("digests", self._digest)
        copies = self._timed("exact copies", self._exact)
        contaminated = self._timed("sketches", lambda: self._sketch(copies[0]))
        near = self._timed("candidates", self._near)
        removals = _merge_removals(copies, near, contaminated)
        for code, reason in enumerate(REASONS):
            self.summary.removed[reason] = int(np.count_nonzero(removals[1] == code))
        self._timed("shards", lambda: self._write(removals))
        return self.summary

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        result = work()
        self.summary.seconds[stage] = round(time.monotonic() - started, 3)
        return result

    def _digest(self) -> None:
        settings, unusable = self.settings, Unusable()
        tasks = [DigestTask(unit, self.output, settings.key, settings.max_record_bytes) for unit in self.units]
        results = map_tasks(digest_unit, tasks, self.workers, "digests", self.weights)
        self.runs = layout_runs(result["sizes"] for result in results)
        for result in results:
            unusable.include(result["unusable"])
            self.summary.characters += result["characters"]
        self.summary.documents = sum(run.size for run in self.runs)
        unusable.check(self.summary.documents, settings.max_bad_ratio, settings.allow_damaged)
        self.summary.unusable = asdict(unusable)

    def _exact(self) -> np.ndarray:
        """int64 [2, D]: copies, rising, and their originals."""
        ranges = key_ranges(self.summary.documents, self.memory)
        tasks = [ExactTask(self.output, self.runs, key_range) for key_range in ranges]
        parts = map_tasks(exact_copies, tasks, self.workers, "exact copies", [1] * len(tasks))
        copies = np.concatenate(parts, axis=1)
        return copies[:, np.argsort(copies[0])]

    def _sketch(self, copies: np.ndarray) -> np.ndarray:
        """int64 [2, D]: contaminated documents, rising, and the benchmark items found in them."""
        settings = self.settings
        ngram = settings.decontaminate_ngram if self.benchmarks else None
        tasks = []
        for unit in self.units:
            runs = [run for run in self.runs if run.unit == unit.number]
            here = copies[_between(copies, runs)]
            banding, limit = settings.banding, settings.max_record_bytes
            tasks.append(SketchTask(unit, self.output, settings.key, runs, banding, settings.ngram, ngram, here, limit))
        results = map_tasks(sketch_unit, tasks, self.workers, "sketches", self.weights)
        pairs = [pair for result in results for pair in result["contaminated"]]
        return np.array(pairs, np.int64).reshape(-1, 2).T

    def _near(self) -> np.ndarray:
        """int64 [2, D]: near copies, rising, and the documents kept for them."""
        ranges = key_ranges(self.summary.documents, self.memory)
        tasks = [
            CandidateTask(self.output, self.runs, band, key_range, self.settings.threshold)
            for band in range(self.settings.banding.bands)
            for key_range in ranges
        ]
        results = map_tasks(verify_candidates, tasks, self.workers, "candidates", [1] * len(tasks))
        histogram = sum((histogram for _, histogram in results), np.zeros(SIMILARITY_BINS, np.int64))
        self.summary.similarity_histogram = histogram.tolist()
        self.summary.compared_pairs = int(histogram.sum())
        store = Store(self.output, self.runs)
        near, sizes = drop_near_copies((pairs for pairs, _ in results), self.settings.keep, store)
        self.summary.clusters = int(sizes.size)
        values, counts = np.unique(sizes, return_counts=True)
        self.summary.cluster_sizes = dict(zip(values.tolist(), counts.tolist()))
        return near

    def _write(self, removals: np.ndarray) -> None:
        settings = self.settings
        items = self.benchmarks.items if self.benchmarks else []
        tasks = []
        for unit in self.units:
            runs = [run for run in self.runs if run.unit == unit.number]
            here = removals[:, _between(removals[0], runs)]
            tasks.append(WriteTask(unit, self.units, self.output, settings, self.runs, here, items))
        for result in map_tasks(write_unit, tasks, self.workers, "shards", self.weights):
            self.summary.kept += result["kept"]
            self.summary.kept_characters += result["kept_characters"]
        expected = self.summary.documents - removals.shape[1]
        if self.summary.kept != expected:
            raise UserError(f"the input changed while it was read ({self.summary.kept} documents, not {expected})")

    def discard_work(self) -> None:
        """Remove the arrays between the stages; only the note of whose run this was stays."""
        for path in (self.output / DONE_DIRECTORY).iterdir():
            if path.name != "run.json":
                path.unlink() if path.is_file() else shutil.rmtree(path)


def _between(rising: np.ndarray, runs: list[SortedRun]) -> slice:
    """The slice of ascending document numbers within a unit's runs."""
    first, last = runs[0].start, runs[-1].start + runs[-1].size
    return slice(*np.searchsorted(rising, [first, last]).tolist())


def _merge_removals(copies: np.ndarray, near: np.ndarray, contaminated: np.ndarray) -> np.ndarray:
    """int64 [3, D]: dropped documents, rising, the reason's place in REASONS, and the document kept or item found.

    Where the original of an exact copy is itself dropped for a similar document, the copy names that one.
    """
    originals = copies[1].copy()
    if near.shape[1]:
        places = np.minimum(np.searchsorted(near[0], originals), near.shape[1] - 1)
        moved = near[0][places] == originals
        originals[moved] = near[1][places[moved]]
    by_reason = (np.stack([copies[0], originals]), near, contaminated)
    parts = [np.insert(pairs, 1, code, axis=0) for code, pairs in enumerate(by_reason)]
    removals = np.concatenate(parts, axis=1)
    return removals[:, np.argsort(removals[0])]


@dataclass(frozen=True)
class WriteTask:
    """One unit to be written without its removed documents."""

    unit: Unit
    units: list[Unit]
    output: Path
    settings: Settings
    runs: list[SortedRun]
    removals: np.ndarray
    benchmark_items: list[str]


@noted("shards")
def write_unit(task: WriteTask) -> dict[str, Any]:
    """Write a unit's shard and, if wanted, what was removed from it with the reason and the document it is like.

    Returns:
        `kept` and `kept_characters`.
    """
    removed = {number: (code, because) for number, code, because in task.removals.T.tolist()}
    store = Store(task.output, task.runs)
    first = next(run.start for run in task.runs if run.unit == task.unit.number)
    kept, kept_characters, key = 0, 0, task.settings.key
    with open_shards(task.output, task.unit, task.settings.keep_rejected) as (shard, rejected):
        documents = read_unit(task.unit, key, Unusable(), True, task.settings.max_record_bytes)
        for number, (_, document) in enumerate(documents, first):
            record = {**document.extra, key: document.text}
            if number not in removed:
                shard.write(record)
                kept += 1
                kept_characters += len(document.text)
            elif rejected is not None:
                rejected.write(record | _because(task, store, *removed[number]))
    return {"kept": kept, "kept_characters": kept_characters}


def _because(task: WriteTask, store: Store, code: int, because: int) -> dict[str, str]:
    """The fields that explain why a document was removed."""
    reason = REASONS[code]
    if reason == "contaminated":
        return {"rejected_by": reason, "contaminated_by": task.benchmark_items[because]}
    unit, piece, line = store.line(because)
    return {"rejected_by": reason, "duplicate_of": f"{task.units[unit].pieces[piece]}:{line}"}
