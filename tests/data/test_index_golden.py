"""The order of the data equals Megatron-LM's.

The hashes below were made by running Megatron-LM's own `GPTDataset`, `BlendedDataset` and `IndexedDatasetBuilder`
(commit d98e8a64ddf3, its compiled helpers) over the documents of `documents()`: the first 16 hex digits of the
sha256 of each array's bytes, and of the tokens of the first 60 samples.
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from megalite.config.sources import parse_sources
from megalite.data.blend import build_blend
from megalite.data.dataset import SampledFile, SampleOrder, TokenDataset, build_datasets
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.sample_index import plan_cut

pytestmark = pytest.mark.fast


class Golden(NamedTuple):
    indices: list[tuple[str, str, str]]  # document, sample, shuffle index of each file
    blend: str  # dataset index, then dataset sample index
    tokens: str


GOLDEN = {
    "one_epoch": Golden(
        [
            ("a4a941b87719be26", "3a34cc899f5af3c1", "d365b5359008a563"),
        ],
        "",
        "72e59436a89c8eba",
    ),
    "two_epochs": Golden(
        [
            ("578f9d0799aa9500", "65953097411de40d", "545864ba98bad9d3"),
        ],
        "",
        "1a878b76ac238113",
    ),
    "two_separate": Golden(
        [
            ("e3e4ec5f339cc0bd", "630d6795e4369da2", "0665127dc7dd11cb"),
        ],
        "",
        "87ac2289c0606a32",
    ),
    "five_separate": Golden(
        [
            ("b618ae4d1d4bd3ba", "138175d33bb07eff", "7bd2cb7a1cc7c5d1"),
        ],
        "",
        "0d5430b6a872d56b",
    ),
    "sequence_longer_than_documents": Golden(
        [
            ("9f564353fed203bb", "8609b42cd1791df2", "8896646f70dc2e30"),
        ],
        "",
        "426deac9c5ea2685",
    ),
    "split_train": Golden(
        [
            ("78ff2fef266e828c", "c1bfe6c92a9eef5f", "cd4617cb5d5998e6"),
        ],
        "",
        "20e68be06511bfb1",
    ),
    "split_valid": Golden(
        [
            ("48e437996ee23816", "1fe2c11012282259", "e27b42d25bf60204"),
        ],
        "",
        "ee2ab6f56c1f7fdb",
    ),
    "weighted_single_train": Golden(
        [
            ("78ff2fef266e828c", "c1bfe6c92a9eef5f", "cd4617cb5d5998e6"),
        ],
        "dde9f204db8707cc",
        "20e68be06511bfb1",
    ),
    "weighted_single_valid": Golden(
        [
            ("3d2d45896d75a6cb", "0096def292122d1a", "8d2ab13421e011f1"),
        ],
        "d3046b716020a232",
        "083a1a534e16c16f",
    ),
    "blend_weights": Golden(
        [
            ("1dc213c912a005dd", "0ec6903745e6ef6d", "d7e0f1b5e2eec114"),
            ("944206e2bd77b50c", "f8c4b148613984b0", "1e2da8383fcbe0f8"),
            ("b95b5f1420219750", "e6769d8940d4b75b", "7207b828b5ce8d2a"),
        ],
        "683ed3d8c6577d05",
        "52920345cf3ea75f",
    ),
    "blend_no_weights": Golden(
        [
            ("1dc213c912a005dd", "0ec6903745e6ef6d", "d7e0f1b5e2eec114"),
            ("944206e2bd77b50c", "f8c4b148613984b0", "1e2da8383fcbe0f8"),
            ("e0b95a1ac04f3e8d", "074825323c8fe265", "165d245329fc621f"),
        ],
        "fabcfc656096ca7a",
        "0193547e94822ba6",
    ),
    "blend_exhaustive": Golden(
        [
            ("1dc213c912a005dd", "0ec6903745e6ef6d", "d7e0f1b5e2eec114"),
            ("944206e2bd77b50c", "f8c4b148613984b0", "1e2da8383fcbe0f8"),
            ("e0b95a1ac04f3e8d", "074825323c8fe265", "165d245329fc621f"),
        ],
        "36c5cdae771de472",
        "0193547e94822ba6",
    ),
    "blend_split_train": Golden(
        [
            ("e4fce1de485c543a", "a33cab8844a0a050", "b34ef058380cf2a1"),
            ("f16097e7b268408a", "513a4fdf2ee14f68", "b8afe22c3245466d"),
        ],
        "356c63d16681754a",
        "1ea5c044c11c25bd",
    ),
    "blend_split_valid": Golden(
        [
            ("1cee190bf42180eb", "d2dd8f37fe2c0db9", "f764e62d00df3d69"),
            ("503a96bf7f55764c", "de8e9c2d28d3020c", "993a8c03bec22024"),
        ],
        "90f46925fa58258e",
        "392c469f96c5f431",
    ),
}
KEEP_LAST = ("2dd2a55ac9c6a1e8", "cc216b6ba940bb6b", "ecb42363a8e54ffb")  # drop_last_partial_validation_sequence=False
FILE_SHA256 = {
    "bin": "ef83fb78aaddd6420b12dff6a15cf75e69df0bf55dbc4b5e7c649c2b5f54b1bc",
    "idx": "db0c470e3c9bfc6dc143c283a66975b82399748178b91669834588930518dbd5",
}


def documents(count: int, longest: int, salt: int) -> list[list[int]]:
    lengths = [1 + (i * i * 7 + i * 37 + salt * 11) % longest for i in range(count)]
    return [[(i * 31 + j * 7 + salt) % 1000 for j in range(length)] for i, length in enumerate(lengths)]


def write(prefix: Path, texts: list[list[int]], dtype: type) -> str:
    with IndexedWriter(prefix, dtype) as writer:
        for text in texts:
            writer.add_document(text)
    return str(prefix)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokens")
    shapes = {"a": (211, 60, 1, np.uint16), "b": (97, 150, 2, np.uint16), "c": (400, 23, 3, np.int32)}
    return {name: write(folder / name, documents(*shape[:3]), shape[3]) for name, shape in shapes.items()}


def short(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def index_hashes(source: SampledFile) -> tuple[str, ...]:
    return tuple(short(source.indices[name]) for name in ("document_index", "sample_index", "shuffle_index"))


def check(dataset: TokenDataset, name: str) -> None:
    golden, blend = GOLDEN[name], dataset.blend()
    assert [index_hashes(source) for source in dataset.sources] == golden.indices
    assert (short(blend["dataset_index"], blend["dataset_sample_index"]) if blend else "") == golden.blend
    count = len(dataset) if blend else len(dataset.sources[0])
    assert short(*[dataset[number] for number in range(min(count, 60))]) == golden.tokens


def build(train, samples, valid_samples, seq_length, seed, split="", cache_dir=None):
    config = SimpleNamespace(train=train, valid=[], split=split)
    return build_datasets(
        config,
        seq_length=seq_length,
        seed=seed,
        train_samples=samples,
        valid_samples=valid_samples,
        vocab_size=1000,
        cache_dir=cache_dir,
    )


@pytest.mark.parametrize(
    ("name", "file", "samples", "seq_length", "seed"),
    [
        ("one_epoch", "a", 100, 32, 1234),
        ("two_epochs", "a", 360, 32, 7),
        ("two_separate", "a", 250, 32, 42),
        ("five_separate", "b", 2000, 16, 1),
        ("sequence_longer_than_documents", "c", 40, 333, 99),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_one_file(files, tmp_path, name, file, samples, seq_length, seed, cached):
    for _ in range(1 + cached):  # the second time is read back from the cache
        cache_dir = tmp_path if cached else None
        dataset, none = build([files[file]], samples, 0, seq_length, seed, cache_dir=cache_dir)
        check(dataset, name)
        assert none is None and len(dataset) == samples


def test_split(files):
    train, valid = build([files["a"]], 300, 40, 16, 5, "80,15,5")
    check(train, "split_train")
    check(valid, "split_valid")


def test_one_weighted_file_with_split_is_built_as_a_blend(files):
    train, valid = build([[2.0, files["a"]]], 300, 40, 16, 5, "80,20,0")
    check(train, "weighted_single_train")
    check(valid, "weighted_single_valid")


def test_blend_with_weights(files):
    pairs = [[0.5, files["a"]], [0.2, files["b"]], [0.7, files["c"]]]
    check(build(pairs, 1000, 0, 16, 11)[0], "blend_weights")


def test_blend_without_weights(files):
    check(build([files[name] for name in "abc"], 1000, 0, 16, 11)[0], "blend_no_weights")


def test_blend_of_everything_once(files):
    everything = SampleOrder(16, 11).dataset(parse_sources([files[name] for name in "abc"], "files"), None)
    check(everything, "blend_exhaustive")


def test_blend_with_split_and_weights(files):
    train, valid = build([[1, files["a"]], [3, files["b"]]], 700, 60, 16, 3, "90,10,0")
    check(train, "blend_split_train")
    check(valid, "blend_split_valid")


def test_last_partial_sample_kept(files):
    source = SampledFile(IndexedDataset(files["a"]), range(211), 16, 5, None, drop_last=False)
    assert index_hashes(source) == KEEP_LAST


def test_token_file_bytes(tmp_path):
    texts = documents(50, 40, 9)
    texts[7] = texts[49] = []
    write(tmp_path / "m", texts, np.uint16)
    for suffix, expected in FILE_SHA256.items():
        assert hashlib.sha256((tmp_path / f"m.{suffix}").read_bytes()).hexdigest() == expected


def test_kept_last_sample_is_counted_exactly_where_megatron_rounds():
    # Megatron-LM's helpers.cpp makes 100,000 samples of this, because 100,000,001 is no 32-bit float
    assert plan_cut(100_000_002, 1000, None, drop_last=False).samples == 100_001
    assert plan_cut(100_000_001, 1000, None, drop_last=False).samples == 100_000


def test_longer_blend_begins_with_the_shorter():
    rng = np.random.default_rng()
    weights = rng.random(int(rng.integers(2, 30))) + 0.01
    weights = (weights / weights.sum()).tolist()
    whole, counts = build_blend(weights, 3000), np.zeros(len(weights), np.int64)
    parts = [build_blend(weights, size, counts) for size in (1, 777, 2222)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
