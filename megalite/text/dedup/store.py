"""What deduplication keeps on disk between its stages, so that its memory does not grow with the corpus.

A unit's documents are cut into runs of at most `RUN_DOCUMENTS`. Each run holds sorted arrays, so that all runs together
can be sorted by one range of keys at a time: keys are hashes, hence spread evenly, and every range takes the same
memory. A document's number is its place in the whole input, and so the same for any number of workers.

n: documents of a run; B: bands; K: keys found in a range
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.data.index_cache import write_array
from megalite.files import atomic_file, write_errors_named
from megalite.text.jobs import DONE_DIRECTORY

RUN_DOCUMENTS = 1 << 16
SORT_BYTES_PER_KEY = 96  # what gathering and sorting one key takes, measured


@dataclass(frozen=True)
class SortedRun:
    """A run's place: its unit, its number there, and its documents' numbers [start, start + size)."""

    unit: int
    number: int
    start: int
    size: int


def run_path(output: Path, unit: int, number: int, kind: str) -> Path:
    """File of one array of a run: `digests`, `lines`, `keys`, `places`, `table`, `ends`, or the bare uint32 `sets`."""
    return output / DONE_DIRECTORY / f"{unit:05d}-{number:05d}.{kind}"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array so that its name never shows half of it."""
    with write_errors_named(path), atomic_file(path) as file:
        write_array(file, array)


def layout_runs(sizes: Iterable[Sequence[int]]) -> list[SortedRun]:
    """All runs in input order, from the sizes of each unit's runs."""
    runs: list[SortedRun] = []
    start = 0
    for unit, unit_sizes in enumerate(sizes):
        for number, size in enumerate(unit_sizes):
            runs.append(SortedRun(unit, number, start, size))
            start += size
    return runs


class Store:
    """Read access to the arrays of all runs, mapped into memory when first used."""

    def __init__(self, output: Path, runs: Sequence[SortedRun]) -> None:
        self.output = output
        self.runs = runs
        self._starts = np.array([run.start for run in runs], np.int64)
        self._open: dict[tuple[int, str], np.ndarray] = {}

    def array(self, index: int, kind: str) -> np.ndarray:
        """An array of the run with this index, memory-mapped."""
        if (index, kind) not in self._open:
            run = self.runs[index]
            path = run_path(self.output, run.unit, run.number, kind)
            if kind != "sets":
                self._open[index, kind] = np.load(path, mmap_mode="r")
            elif path.stat().st_size:
                self._open[index, kind] = np.memmap(path, np.uint32, "r")
            else:
                self._open[index, kind] = np.empty(0, np.uint32)  # an empty file cannot be mapped
        return self._open[index, kind]

    def place(self, document: int) -> tuple[int, int]:
        index = int(np.searchsorted(self._starts, document, side="right")) - 1
        return index, document - self.runs[index].start

    def shingles(self, document: int) -> np.ndarray:
        """The shingle set of a document, uint32, sorted."""
        index, local = self.place(document)
        ends = self.array(index, "ends")
        return np.asarray(self.array(index, "sets")[ends[local] : ends[local + 1]])

    def band_keys(self, documents: np.ndarray) -> np.ndarray:
        """The keys of documents, uint64 [len(documents), B]."""
        places = [self.place(document) for document in documents.tolist()]
        return np.stack([self.array(index, "table")[local] for index, local in places])

    def line(self, document: int) -> tuple[int, int, int]:
        """Where a document stood: unit, piece of it, line."""
        index, local = self.place(document)
        piece, line = self.array(index, "lines")[:, local].tolist()
        return self.runs[index].unit, piece, line


def key_ranges(keys: int, memory: int) -> list[tuple[int, int]]:
    """Split the 64-bit keys into inclusive ranges that each take about `memory` bytes to sort."""
    count = max(1, -(-keys * SORT_BYTES_PER_KEY // memory))
    edges = [(1 << 64) * part // count for part in range(count + 1)]
    return [(low, high - 1) for low, high in itertools.pairwise(edges)]


def slice_of_range(sorted_keys: np.ndarray, key_range: tuple[int, int]) -> slice:
    """The slice of sorted keys within an inclusive range."""
    low, high = (np.uint64(edge) for edge in key_range)
    return slice(
        int(np.searchsorted(sorted_keys, low, side="left")), int(np.searchsorted(sorted_keys, high, side="right"))
    )


def equal_key_groups(store: Store, band: int, key_range: tuple[int, int]) -> Iterator[np.ndarray]:
    """Numbers of documents with the same key in a band, int64, rising, at least two; in order of their keys."""
    parts_of_keys, parts_of_documents = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for index, run in enumerate(store.runs):
        sorted_keys = store.array(index, "keys")[band]
        part = slice_of_range(sorted_keys, key_range)
        parts_of_keys.append(sorted_keys[part])
        parts_of_documents.append(store.array(index, "places")[band][part].astype(np.int64) + run.start)
    keys_K, documents_K = np.concatenate(parts_of_keys), np.concatenate(parts_of_documents)
    order_K = np.argsort(keys_K, kind="stable")  # runs follow in input order, and so do the documents of a key
    keys_K, documents_K = keys_K[order_K], documents_K[order_K]
    edges = np.flatnonzero(np.concatenate(([True], keys_K[1:] != keys_K[:-1], [True])))
    for first in np.flatnonzero(np.diff(edges) > 1).tolist():
        yield documents_K[edges[first] : edges[first + 1]]
