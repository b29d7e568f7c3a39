"""The parts of deduplication: shingles, MinHash, banding, groups of equal keys, clusters, benchmark n-grams."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalite.errors import UserError
from megalite.text.dedup.clusters import UnionFind, drop_near_copies
from megalite.text.dedup.contamination import read_benchmarks
from megalite.text.dedup.minhash import Banding, Sketcher, choose_banding, jaccard
from megalite.text.dedup.near import CandidateTask, verify_candidates
from megalite.text.dedup.store import SortedRun, Store, equal_key_groups, key_ranges, run_path, save_array
from megalite.text.jobs import DONE_DIRECTORY
from megalite.text.words import WordNumbers, comparable_words, ngram_hashes

pytestmark = pytest.mark.fast


def random_words(count: int, seed: int) -> list[str]:
    source = random.Random(seed)
    return ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 300])
def test_shingles_are_the_set_of_word_5_grams(count: int) -> None:
    words = random_words(count, count)
    words = words + words[: count // 3]  # some shingles twice
    sketcher = Sketcher(Banding(2, 3))
    found = sketcher.shingles(sketcher.word_numbers(" ".join(words)))
    expected = {tuple(words[i : i + 5]) for i in range(len(words) - 4)} or ({tuple(words)} if words else set())
    assert found.size == len(expected)
    assert found.dtype == np.uint32 and bool(np.all(found[1:] > found[:-1]))


def test_comparison_ignores_case_punctuation_spacing_and_composition() -> None:
    assert comparable_words("Cafe\u0301,  the\nEND!") == comparable_words("café The end") == ["café", "the", "end"]
    assert comparable_words("日本語 text") == ["日", "本", "語", "text"]


def test_word_numbers_are_the_same_in_every_process_and_survive_forgetting() -> None:
    words = random_words(50, 1)
    code = f"from megalite.text.words import WordNumbers; print(WordNumbers().of({words!r}).tolist())"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    small = WordNumbers(limit=3)
    assert str(small.of(words).tolist()) == other.strip()
    assert len(small) <= 3


def test_ngram_hashes_differ_with_order_and_length() -> None:
    numbers = WordNumbers().of(["a", "b", "c", "a", "b", "c"])
    hashes = ngram_hashes(numbers, 3)
    assert hashes.size == 4
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 3
    assert ngram_hashes(numbers, 7).size == 0


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.9])
def test_minhash_estimates_jaccard(similarity: float) -> None:
    """Agreement of 1,024 values over random set pairs: within four standard errors of the true similarity."""
    sketcher = Sketcher(Banding(128, 8))
    generator = np.random.default_rng(int(similarity * 10))
    size = 3000  # more than one block of hashing
    shared = int(2 * size * similarity / (1 + similarity))
    values = generator.choice(1 << 32, 2 * size - shared, replace=False).astype(np.uint32)
    first, second = np.sort(values[:size]), np.sort(values[size - shared :])
    true = shared / values.size
    assert jaccard(first, [second])[0] == pytest.approx(true)
    agreement = np.mean(sketcher.signature(first) == sketcher.signature(second))
    assert abs(agreement - true) < 4 * (true * (1 - true) / 1024) ** 0.5


def test_band_keys_agree_exactly_where_all_rows_do() -> None:
    sketcher = Sketcher(Banding(6, 4))
    signature = np.random.default_rng(0).integers(0, 1 << 32, 24, dtype=np.uint32)
    keys = sketcher.band_keys(signature)
    assert len(set(keys.tolist())) == 6
    for changed in range(24):
        other = signature.copy()
        other[changed] += 1
        assert np.flatnonzero(sketcher.band_keys(other) != keys).tolist() == [changed // 4]


def test_jaccard_with_several_sets_equals_python_sets() -> None:
    generator = np.random.default_rng(3)
    sets = [np.unique(generator.integers(0, 60, size).astype(np.uint32)) for size in (1, 7, 40, 90, 200)]
    for first in sets:
        expected = [len({*first} & {*other}) / len({*first} | {*other}) for other in sets]
        assert jaccard(first, sets) == pytest.approx(expected)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_automatic_banding_finds_nearly_all_at_the_threshold(threshold: float) -> None:
    banding = choose_banding(threshold)
    assert banding.recall(threshold) >= 0.98
    assert banding.bands * banding.rows <= 128
    one_more = Banding(128 // (banding.rows + 1), banding.rows + 1)
    assert one_more.bands == 0 or one_more.recall(threshold) < 0.98, "more rows would do"


def test_wrong_bandings_are_refused() -> None:
    for arguments, message in (
        ((0.0,), "--threshold 0.0 must be above 0"),
        ((1.5,), "--threshold 1.5"),
        ((float("nan"),), "--threshold nan"),
        ((0.8, 4), "--bands and --rows go together"),
        ((0.8, 0, 3), "--bands 0 --rows 3"),
        ((0.8, 5000, 1), "at most 4096"),
    ):
        with pytest.raises(UserError, match=message):
            choose_banding(*arguments)
    assert choose_banding(0.8, 3, 5) == Banding(3, 5)


def make_store(directory: Path, sets: list[np.ndarray], keys: np.ndarray, run_sizes: list[int]) -> Store:
    """A store as the sketch stage leaves it, from given shingle sets and keys [documents, B]."""
    (directory / DONE_DIRECTORY).mkdir(parents=True)
    runs, start = [], 0
    for number, size in enumerate(run_sizes):
        runs.append(SortedRun(0, number, start, size))
        part, table = sets[start : start + size], keys[start : start + size]
        order = np.argsort(table.T, axis=1, kind="stable")
        arrays = {
            "keys": np.take_along_axis(table.T, order, axis=1),
            "places": order.astype(np.uint32),
            "table": table,
            "ends": np.cumsum([0, *(s.size for s in part)]),
        }
        for kind, array in arrays.items():
            save_array(run_path(directory, 0, number, kind), array)
        run_path(directory, 0, number, "sets").write_bytes(b"".join(s.tobytes() for s in part))
        start += size
    return Store(directory, runs)


def test_groups_of_equal_keys_over_runs_do_not_depend_on_the_ranges(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    spread = generator.integers(0, 1 << 64, 40, dtype=np.uint64)
    spread[:2] = 0, (1 << 64) - 1
    keys = generator.choice(spread, (100, 2))
    store = make_store(tmp_path, [np.arange(1, dtype=np.uint32)] * 100, keys, [30, 1, 50, 19])
    for band in range(2):
        documents: dict[int, list[int]] = {}
        for document, key in enumerate(keys[:, band].tolist()):
            documents.setdefault(key, []).append(document)
        expected = sorted(group for group in documents.values() if len(group) > 1)
        for memory in (1 << 30, 700):
            ranges = key_ranges(100, memory)
            assert (len(ranges) > 5) == (memory == 700)
            groups = [group.tolist() for part in ranges for group in equal_key_groups(store, band, part)]
            assert sorted(groups) == expected


@pytest.mark.parametrize("size", [10, 200])
def test_every_similar_pair_of_a_group_ends_in_one_cluster(size: int, tmp_path: Path) -> None:
    """Groups below and above the limit of all-with-all comparison: families of like sets under one key."""
    generator = np.random.default_rng(size)
    families = [generator.choice(1 << 31, 100, replace=False) for _ in range(4)]
    family_of = generator.integers(0, 4, size)
    sets = []
    for family in family_of:
        members = families[family].copy()
        members[generator.integers(0, 100)] = generator.integers(1 << 31, 1 << 32)  # J = 99/101 or 98/102
        sets.append(np.unique(members.astype(np.uint32)))
    store = make_store(tmp_path, sets, np.ones((size, 2), np.uint64), [size])
    found = [
        verify_candidates(CandidateTask(tmp_path, list(store.runs), band, (0, (1 << 64) - 1), 0.9)) for band in range(2)
    ]
    (dropped, kept), sizes = drop_near_copies((pairs for pairs, _ in found), "first", store)
    firsts = {family: int(np.flatnonzero(family_of == family)[0]) for family in range(4)}
    expected = {i: firsts[f] for i, f in enumerate(family_of.tolist()) if firsts[f] != i}
    assert dict(zip(dropped.tolist(), kept.tolist())) == expected
    assert sorted(sizes.tolist()) == sorted(n for n in np.bincount(family_of, minlength=4).tolist() if n > 1)
    if size == 10:
        assert found[1][1].sum() == 0, "a pair was compared again in a later band"


def test_union_find_equals_search_of_connected_parts() -> None:
    source = random.Random(2)
    edges = [(source.randrange(60), source.randrange(60)) for _ in range(35)]
    sets = UnionFind(60)
    for edge in edges:
        sets.join(*edge)
    labels = list(range(60))
    for _ in range(60):
        for first, second in edges:
            labels[first] = labels[second] = min(labels[first], labels[second])
    assert sets.labels().tolist() == labels


def test_longest_is_kept_and_the_first_of_equals(tmp_path: Path) -> None:
    sets = [np.arange(size, dtype=np.uint32) for size in (5, 9, 9, 3)]
    store = make_store(tmp_path, sets, np.ones((4, 1), np.uint64), [4])
    for pairs in itertools.permutations([[0, 1], [3, 2], [1, 3]]):
        (dropped, kept), sizes = drop_near_copies([np.array(pairs)], "longest", store)
        assert dropped.tolist() == [0, 2, 3] and kept.tolist() == [1, 1, 1] and sizes.tolist() == [4]


def test_benchmark_ngrams(tmp_path: Path) -> None:
    words = random_words(40, 9)
    bench = tmp_path / "bench.jsonl"
    bench.write_text(
        "".join(f'{{"text": "{text}"}}\n' for text in (" ".join(words[:20]), "a b c", " ".join(words[20:])))
    )
    found = read_benchmarks([bench], "text", 13)
    assert (found.too_short, len(found.items)) == (1, 3)
    numbers = WordNumbers()
    assert found.find(numbers.of(["x", *words[22:35], "y"])) == 2
    assert found.find(numbers.of(["x", *words[22:34], "y"])) is None  # 12 words only
    assert found.find(numbers.of(words[14:26])) is None
    assert found.find(numbers.of(["short"])) is None
    with pytest.raises(UserError, match="no item has 50 words"):
        read_benchmarks([bench], "text", 50)
