"""The exact pass: texts that are equal byte for byte, found by 128-bit BLAKE2b digests; the first in the input stays.

n: documents of a run; K: digests found in a range of keys; D: documents dropped
"""

from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from megalite.text.dedup.store import RUN_DOCUMENTS, SortedRun, Store, run_path, save_array, slice_of_range
from megalite.text.jobs import Unit, noted
from megalite.text.records import MAX_RECORD_BYTES
from megalite.text.shards import Unusable, read_unit


@dataclass(frozen=True)
class DigestTask:
    """One unit to be digested."""

    unit: Unit
    output: Path
    key: str
    max_record_bytes: int = MAX_RECORD_BYTES


@noted("exact")
def digest_unit(task: DigestTask) -> dict[str, Any]:
    """Write the sorted digests and the lines of a unit's documents, run by run.

    Returns:
        `sizes` (documents of each run), `characters`, `unusable`.
    """
    unusable = Unusable()
    digests, sizes = bytearray(), list[int]()
    lines = list[tuple[int, int]]()
    characters = 0
    for piece, document in read_unit(task.unit, task.key, unusable, False, task.max_record_bytes):
        digests += blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        lines.append((piece, document.line))
        characters += len(document.text)
        if len(lines) == RUN_DOCUMENTS:
            sizes.append(_save_run(task, len(sizes), digests, lines))
            digests, lines = bytearray(), []
    if lines or not sizes:
        sizes.append(_save_run(task, len(sizes), digests, lines))
    return {"sizes": sizes, "characters": characters, "unusable": asdict(unusable)}


def _save_run(task: DigestTask, number: int, digests: bytearray, lines: list[tuple[int, int]]) -> int:
    """Save one run: `digests` uint64 [3, n] (both halves, place in the run), sorted; `lines` int64 [2, n]."""
    halves = np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2).T
    order = np.argsort(halves[0], kind="stable")
    path = run_path(task.output, task.unit.number, number, "digests")
    save_array(path, np.stack([halves[0][order], halves[1][order], order.astype(np.uint64)]))
    save_array(
        run_path(task.output, task.unit.number, number, "lines"), np.array(lines, np.int64).reshape(-1, 2).T.copy()
    )
    return len(lines)


@dataclass(frozen=True)
class ExactTask:
    """One range of digests, over all runs."""

    output: Path
    runs: list[SortedRun]
    key_range: tuple[int, int]


def exact_copies(task: ExactTask) -> np.ndarray:
    """Copies of an earlier text whose digests begin within the range: int64 [2, D], the copies and their originals."""
    store = Store(task.output, task.runs)
    parts = [np.empty((3, 0), np.uint64)]
    for index, run in enumerate(task.runs):
        digests = store.array(index, "digests")
        part = np.array(digests[:, slice_of_range(digests[0], task.key_range)])
        part[2] += np.uint64(run.start)
        parts.append(part)
    first_K, second_K, documents_K = np.concatenate(parts, axis=1)
    order_K = np.lexsort((documents_K, second_K, first_K))
    first_K, second_K, documents_K = first_K[order_K], second_K[order_K], documents_K[order_K].astype(np.int64)
    new_K = np.ones(first_K.size, bool)
    new_K[1:] = (first_K[1:] != first_K[:-1]) | (second_K[1:] != second_K[:-1])
    originals_K = documents_K[np.flatnonzero(new_K)[np.cumsum(new_K) - 1]]
    return np.stack([documents_K[~new_K], originals_K[~new_K]])
