"""The near pass: band keys of every document, candidates from equal keys, and their true Jaccard similarity.

n: documents of a run; B: bands; S: shingles; m: documents of a group that share a key
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from megalite.errors import UserError
from megalite.files import atomic_file, write_errors_named
from megalite.text.dedup.contamination import load_arrays
from megalite.text.dedup.minhash import Banding, Sketcher, jaccard
from megalite.text.dedup.store import SortedRun, Store, equal_key_groups, run_path, save_array
from megalite.text.jobs import DONE_DIRECTORY, Unit, noted
from megalite.text.records import MAX_RECORD_BYTES
from megalite.text.shards import Unusable, read_unit

SIMILARITY_BINS = 50
LARGE_GROUP = 64  # above this, documents are compared with leaders only and not all with all
MAX_LEADERS = 64


@dataclass(frozen=True)
class SketchTask:
    """One unit to be sketched, all but the copies that the exact pass found in it."""

    unit: Unit
    output: Path
    key: str
    runs: list[SortedRun]
    banding: Banding
    ngram: int
    decontaminate_ngram: int | None
    copies: np.ndarray
    max_record_bytes: int = MAX_RECORD_BYTES


@noted("near")
def sketch_unit(task: SketchTask) -> dict[str, Any]:
    """Write shingle sets and band keys of a unit's documents, run by run.

    Returns:
        `contaminated`: pairs of a document's number and the number of the benchmark item it holds a part of.

    Raises:
        UserError: the unit has other documents than the exact pass saw.
    """
    sketcher = Sketcher(task.banding, task.ngram)
    benchmarks = None
    if task.decontaminate_ngram is not None:
        benchmarks = load_arrays(task.output / DONE_DIRECTORY, task.decontaminate_ngram)
    copies = set(task.copies.tolist())
    contaminated: list[tuple[int, int]] = []
    documents = read_unit(task.unit, task.key, Unusable(), False, task.max_record_bytes)
    texts = (document.text for _, document in documents)
    for run in task.runs:
        sets = run_path(task.output, run.unit, run.number, "sets")
        with write_errors_named(sets), atomic_file(sets) as file:
            builder = _RunBuilder(run.size, task.banding.bands, file)
            for number, text in zip(range(run.start, run.start + run.size), texts):
                shingles_S = np.empty(0, np.uint32)
                if number not in copies:
                    numbers_W = sketcher.word_numbers(text)
                    item = benchmarks.find(numbers_W) if benchmarks else None
                    if item is None:
                        shingles_S = sketcher.shingles(numbers_W)
                    else:
                        contaminated.append((number, item))
                builder.add(shingles_S, sketcher)
            builder.save(task.output, run)
    if any(True for _ in texts) or builder.documents != run.size:
        raise UserError(f"{task.unit.pieces[0]} changed while it was read: start again with a new --output")
    return {"contaminated": contaminated}


class _RunBuilder:
    """Collects a run: shingle sets go straight to the file, band keys stay in memory until they can be sorted."""

    def __init__(self, size: int, bands: int, file: IO[bytes]) -> None:
        self.documents = 0
        self._file = file
        self._table_nB = np.zeros((size, bands), np.uint64)
        self._ends = np.zeros(size + 1, np.int64)

    def add(self, shingles_S: np.ndarray, sketcher: Sketcher) -> None:
        """Add the next document; one without shingles takes part in no band."""
        if shingles_S.size:
            self._table_nB[self.documents] = sketcher.band_keys(sketcher.signature(shingles_S))
            self._file.write(shingles_S.data)
        self._ends[self.documents + 1] = self._ends[self.documents] + shingles_S.size
        self.documents += 1

    def save(self, output: Path, run: SortedRun) -> None:
        present = np.flatnonzero(np.diff(self._ends))
        keys_Bn = self._table_nB[present].T
        order_Bn = np.argsort(keys_Bn, axis=1, kind="stable")
        arrays: dict[str, np.ndarray] = {
            "keys": np.take_along_axis(keys_Bn, order_Bn, axis=1),
            "places": present.astype(np.uint32)[order_Bn],
            "table": self._table_nB,
            "ends": self._ends,
        }
        for kind, array in arrays.items():
            save_array(run_path(output, run.unit, run.number, kind), array)


@dataclass(frozen=True)
class CandidateTask:
    """One range of keys of one band, over all runs."""

    output: Path
    runs: list[SortedRun]
    band: int
    key_range: tuple[int, int]
    threshold: float


@dataclass
class Candidates:
    """Pairs that were compared: how many of each similarity, and those at least as similar as the threshold."""

    histogram: np.ndarray = field(default_factory=lambda: np.zeros(SIMILARITY_BINS, np.int64))
    pairs: list[tuple[int, int]] = field(default_factory=list)


def verify_candidates(task: CandidateTask) -> tuple[np.ndarray, np.ndarray]:
    """Compare the documents that share a key in the task's range.

    The outcome depends on the groups alone, so neither on the number of ranges nor on the order of tasks.

    Returns:
        Similar pairs, int64 [pairs, 2], and the histogram of all similarities computed, int64 [SIMILARITY_BINS].
    """
    store = Store(task.output, task.runs)
    found = Candidates()
    for documents_m in equal_key_groups(store, task.band, task.key_range):
        if documents_m.size > LARGE_GROUP:
            _compare_with_leaders(documents_m, store, task.threshold, found)
        else:
            _compare_all(documents_m, store, task.band, task.threshold, found)
    return np.array(found.pairs, np.int64).reshape(-1, 2), found.histogram


def _compare_all(documents_m: np.ndarray, store: Store, band: int, threshold: float, found: Candidates) -> None:
    """All pairs, but those that an earlier band compares already and those that are known to be in one cluster."""
    met_mm = np.zeros((documents_m.size, documents_m.size), bool)
    if band:
        table_mB = store.band_keys(documents_m)[:, :band]
        met_mm = (table_mB[:, None] == table_mB[None]).any(axis=2)
    cluster_m = np.arange(documents_m.size)
    for first in range(documents_m.size - 1):
        open_m = ~met_mm[first] & (cluster_m != cluster_m[first])
        others = np.flatnonzero(open_m[first + 1 :]) + first + 1
        for other in _similar(documents_m, first, others, store, threshold, found):
            cluster_m[cluster_m == cluster_m[other]] = cluster_m[first]


def _compare_with_leaders(documents_m: np.ndarray, store: Store, threshold: float, found: Candidates) -> None:
    """A large group: its first document leads, those like it follow, the first of the others leads next, and so on."""
    left = np.arange(documents_m.size)
    for _ in range(MAX_LEADERS):
        leader, left = left[0], left[1:]
        followers = list(_similar(documents_m, leader, left, store, threshold, found))
        left = np.setdiff1d(left, followers, assume_unique=True)
        if left.size < 2:
            return


def _similar(
    documents_m: np.ndarray, first: int, others: np.ndarray, store: Store, threshold: float, found: Candidates
) -> Iterator[int]:
    """Those of the others that are similar enough to the first; pairs and similarities are noted in `found`."""
    if not others.size:
        return
    shingles_S = store.shingles(int(documents_m[first]))
    similarities = np.concatenate(
        [
            jaccard(
                shingles_S, [store.shingles(int(documents_m[other])) for other in others[start : start + LARGE_GROUP]]
            )
            for start in range(0, others.size, LARGE_GROUP)
        ]
    )
    bins = np.minimum((similarities * SIMILARITY_BINS).astype(np.int64), SIMILARITY_BINS - 1)
    found.histogram += np.bincount(bins, minlength=SIMILARITY_BINS)
    for other in others[similarities >= threshold].tolist():
        found.pairs.append((int(documents_m[first]), int(documents_m[other])))
        yield other
