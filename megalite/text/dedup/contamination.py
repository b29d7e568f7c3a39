"""Decontamination: documents that contain a word n-gram of a benchmark file (Brown et al., 2020, appendix C)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.errors import UserError
from megalite.text.dedup.store import save_array
from megalite.text.readers import read_documents
from megalite.text.words import WordNumbers, comparable_words, ngram_hashes


@dataclass(frozen=True)
class Benchmarks:
    """Hashes of all benchmark n-grams, sorted, with the number of the item that each is from, and the items' places."""

    ngram: int
    hashes: np.ndarray
    owners: np.ndarray
    items: list[str]
    too_short: int

    def find(self, numbers_W: np.ndarray) -> int | None:
        """The number of the item that the first n-gram found in a text is from, or None."""
        hashes_N = ngram_hashes(numbers_W, self.ngram)
        if hashes_N.size == 0 or self.hashes.size == 0:
            return None
        places = np.searchsorted(self.hashes, hashes_N)
        places[places == self.hashes.size] = 0
        found = np.flatnonzero(self.hashes[places] == hashes_N)
        return int(self.owners[places[found[0]]]) if found.size else None

    def save(self, directory: Path) -> None:
        """Write the arrays where workers can map them."""
        save_array(directory / "benchmark-hashes.npy", self.hashes)
        save_array(directory / "benchmark-owners.npy", self.owners)


def load_arrays(directory: Path, ngram: int) -> Benchmarks:
    """The saved arrays, mapped into memory; items stay with the caller."""
    hashes, owners = (np.load(directory / f"benchmark-{name}.npy", mmap_mode="r") for name in ("hashes", "owners"))
    return Benchmarks(ngram, hashes, owners, [], 0)


def read_benchmarks(paths: list[Path], key: str, ngram: int) -> Benchmarks:
    """Read benchmark files, each record one item.

    Raises:
        UserError: a record cannot be used, or no item is as long as one n-gram.
    """
    numbers = WordNumbers()
    hashes, owners = list[np.ndarray](), list[np.ndarray]()
    items: list[str] = []
    too_short = 0
    for path in paths:
        for document in read_documents(path, key, with_extra=False):
            item_hashes = np.unique(ngram_hashes(numbers.of(comparable_words(document.text)), ngram))
            too_short += item_hashes.size == 0
            hashes.append(item_hashes)
            owners.append(np.full(item_hashes.size, len(items), np.int32))
            items.append(f"{path}:{document.line}")
    if too_short == len(items):
        raise UserError(f"--decontaminate: no item has {ngram} words; give a smaller --decontaminate-ngram")
    all_hashes, all_owners = np.concatenate(hashes), np.concatenate(owners)
    all_hashes, first = np.unique(all_hashes, return_index=True)
    return Benchmarks(ngram, all_hashes, all_owners[first], items, too_short)
