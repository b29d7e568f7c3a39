"""MinHash sketches, from text to band keys: CPU time and recall against other implementations, in one run.

    python benchmarks/dedup.py --input 'corpus/*.jsonl.gz' [--megabytes 8]

Every variant reads the same documents, makes 5-word shingles and 112 hash values of them, and finds the same planted
copies (1 % of the words changed) by 14 bands x 8 rows; rensa and datasketch take part where they are installed.
Without --input the documents are the sources of Python's standard library. Times are CPU seconds of this process, the
best of the repeats.
"""

import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import tyro

from megalite.cli import program
from megalite.text.dedup.minhash import Banding, Sketcher
from megalite.text.input_files import expand_inputs
from megalite.text.readers import read_documents
from megalite.text.words import comparable_words

BANDING = Banding(14, 8)
HASHES = BANDING.bands * BANDING.rows
Sketch = Callable[[str], np.ndarray]  # text -> hash values [HASHES]


@dataclass(frozen=True)
class Options:
    """MinHash sketches against other implementations."""

    input: tuple[str, ...] = ()
    """Text files; the standard library's sources if none."""
    megabytes: float = 8.0
    """How much text to take."""
    repeats: int = 3
    """The best of so many runs counts."""
    copies: int = 300
    """Planted copies."""


def documents(options: Options) -> list[str]:
    patterns = options.input or (str(Path(sysconfig.get_paths()["stdlib"]) / "*.py"),)
    texts, size = list[str](), 0
    for path in expand_inputs(patterns):
        for document in read_documents(path, on_bad=lambda record: None, with_extra=False):
            if len(document.text) < 500:
                continue
            texts.append(document.text)
            size += len(document.text)
            if size > options.megabytes * 1e6:
                return texts
    return texts


def shingle_bytes(text: str) -> list[bytes]:
    words = comparable_words(text)
    return [" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))]


def megalite_sketch() -> Sketch:
    sketcher = Sketcher(BANDING)
    return lambda text: sketcher.signature(sketcher.shingles(sketcher.word_numbers(text)))


def plain_numpy_sketch() -> Sketch:
    """The usual form: a digest of every shingle's text, then (a x + b) mod 2^61 - 1 over all at once."""
    prime = np.uint64((1 << 61) - 1)
    generator = np.random.default_rng(1)
    factors = generator.integers(1, int(prime), (1, HASHES), dtype=np.uint64)
    offsets = generator.integers(0, int(prime), (1, HASHES), dtype=np.uint64)

    def sketch(text: str) -> np.ndarray:
        digests = b"".join(blake2b(shingle, digest_size=8).digest() for shingle in shingle_bytes(text))
        hashes = np.unique(np.frombuffer(digests, np.uint64))[:, None]
        return ((hashes * factors + offsets) % prime).min(axis=0)

    return sketch


def rensa_sketch() -> Sketch:
    from rensa import RMinHash

    def sketch(text: str) -> np.ndarray:
        minhash = RMinHash(num_perm=HASHES, seed=1)
        words = comparable_words(text)
        minhash.update([" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))])
        return np.array(minhash.digest(), np.uint32)

    return sketch


def datasketch_sketch() -> Sketch:
    from datasketch import MinHash

    def sketch(text: str) -> np.ndarray:
        minhash = MinHash(num_perm=HASHES, seed=1)
        minhash.update_batch(shingle_bytes(text))
        return minhash.hashvalues

    return sketch


def variants() -> Iterator[tuple[str, Sketch]]:
    for name, make in (
        ("megalite", megalite_sketch),
        ("numpy, usual form", plain_numpy_sketch),
        ("rensa", rensa_sketch),
        ("datasketch", datasketch_sketch),
    ):
        try:
            yield name, make()
        except ImportError:
            print(f"{name} is not installed")


def planted(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Documents and copies of them with every hundredth word replaced."""
    source = random.Random(7)
    pairs = []
    for text in source.sample(texts, min(count, len(texts))):
        words = text.split()
        copy = list(words)
        for place in source.sample(range(len(words)), max(1, len(words) // 100)):
            copy[place] = f"changed{source.randrange(10**6)}"
        pairs.append((" ".join(words), " ".join(copy)))
    return pairs


def share_found(sketch: Sketch, pairs: list[tuple[str, str]]) -> float:
    def bands(text: str) -> np.ndarray:
        return sketch(text).reshape(BANDING.bands, BANDING.rows)

    return sum((bands(first) == bands(second)).all(axis=1).any() for first, second in pairs) / max(1, len(pairs))


@program
def main() -> None:
    options = tyro.cli(Options)
    texts = documents(options)
    pairs = planted(texts, options.copies)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {megabytes:.1f} MB; {len(pairs)} planted copies")
    print(f"{'':20}{'CPU s':>8}{'MB/CPU s':>10}{'to megalite':>13}{'copies found':>14}")
    first = 0.0
    for name, sketch in variants():
        best = float("inf")
        for _ in range(options.repeats):
            started = time.process_time()
            for text in texts:
                sketch(text)
            best = min(best, time.process_time() - started)
        first = first or best
        found = share_found(sketch, pairs)
        print(f"{name:20}{best:8.2f}{megabytes / best:10.1f}{best / first:13.2f}{found:14.1%}")


if __name__ == "__main__":
    main()
