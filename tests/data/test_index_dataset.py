"""Datasets by global sample number: continuation beyond the plan, fingerprints, splits, blends, the shared cache."""

import math
import multiprocessing
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from megalite.config import load_config
from megalite.config.sources import Source, parse_sources
from megalite.data import dataset, index_cache
from megalite.data._index import build_sample_index
from megalite.data.dataset import build_datasets
from megalite.data.index_cache import content_key, load_or_build
from megalite.data.indexed import IndexedWriter
from megalite.data.sample_index import plan_cut, split_spans
from megalite.errors import UserError
from megalite.train.inputs import index_folder
from tests.support.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.fast
SEQ = 8


def write(prefix, count, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in rng.integers(1, longest, count):
            writer.add_document(rng.integers(0, 1000, length))
    return str(prefix)


def build(train, samples=50, valid_samples=0, seed=1, valid=(), split="", cache_dir=None):
    return build_datasets(
        SimpleNamespace(train=train, valid=valid, split=split),
        seq_length=SEQ,
        seed=seed,
        train_samples=samples,
        valid_samples=valid_samples,
        vocab_size=1000,
        cache_dir=cache_dir,
    )


def samples_of(data, numbers):
    return [tuple(data[number]) for number in numbers]


def test_beyond_the_plan_every_epoch_is_whole_and_differently_shuffled(tmp_path):
    data, _ = build([write(tmp_path / "a", 60)])
    planned, again = data.sources[0].cut.samples, data.sources[0]._continued_cut.samples
    epochs = [range(planned + n * again, planned + (n + 1) * again) for n in range(2)]
    first, second = (samples_of(data, epoch) for epoch in epochs)
    assert len(set(first)) == again and first != second
    assert samples_of(build([str(tmp_path / "a")])[0], epochs[1]) == second  # and always the same


def test_reading_far_ahead_does_not_change_the_plan(tmp_path):
    prefixes = [[0.5, write(tmp_path / "a", 40, 1)], [0.5, write(tmp_path / "b", 90, 2)]]
    fresh, used = build(prefixes)[0], build(prefixes)[0]
    far = samples_of(used, range(500, 700))
    assert samples_of(used, range(120)) == samples_of(fresh, range(120))
    assert samples_of(build(prefixes)[0], range(500, 700)) == far
    origin = [used.source_of(number)[0] for number in range(500, 700)]
    assert origin.count(used.sources[0]) == 100  # the weights hold beyond the plan
    taken = [(id(source), inner) for source, inner in map(used.source_of, range(700))]
    assert len(set(taken)) == 700  # and every file goes on where it was


def test_fewer_documents_than_a_sample_needs(tmp_path):
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    data, _ = build([str(tmp_path / "a")], samples=3)
    for number in range(20):
        start = data[number][0]
        assert data[number].tolist() == [(start - 1 + place) % 3 + 1 for place in range(SEQ + 1)]


def test_fingerprint_follows_content_and_order_not_the_path(tmp_path):
    prefix = write(tmp_path / "a", 80)
    other = write(tmp_path / "b", 80, seed=9)
    fingerprint = build([prefix])[0].fingerprint()
    (tmp_path / "moved").mkdir()
    for suffix in ("bin", "idx"):
        shutil.copy(f"{prefix}.{suffix}", tmp_path / "moved" / f"x.{suffix}")
    assert build([str(tmp_path / "moved" / "x")])[0].fingerprint() == fingerprint
    assert build([prefix], samples=51)[0].fingerprint() == fingerprint  # the same epoch: the same order
    epoch = build([prefix])[0].sources[0].cut.samples
    changed = [
        build([prefix], samples=epoch + 2)[0],  # two epochs, the second apart
        build([prefix], samples=2 * epoch - 1)[0],  # two epochs together
        build([other])[0],
        build([prefix], seed=2)[0],
        build([prefix], samples=1000)[0],
        build([prefix, other])[0],
        build([[1.0, prefix], [2.0, other]])[0],
        build([[1.0, prefix], [3.0, other]])[0],
        build([prefix], split="50,50")[0],
    ]
    assert len({fingerprint, *(data.fingerprint() for data in changed)}) == 1 + len(changed)


def test_split_gives_disjoint_documents(tmp_path):
    prefix = write(tmp_path / "a", 101)
    for split in ("80,20", [80, 20, 0]):
        train, valid = build([prefix], split=split, valid_samples=10)
        used = [set(data.sources[0].indices["document_index"].tolist()) for data in (train, valid)]
        assert used == [set(range(81)), set(range(81, 101))]
    assert build([prefix], split="80,20", valid_samples=0)[1] is None
    assert build([prefix], split="99,0,1", valid_samples=10)[1] is None


def test_split_bounds_are_rounded_running_sums():
    assert split_spans("969,30,1", 1000) == [range(969), range(969, 999), range(999, 1000)]
    assert split_spans("1,1", 5) == [range(2), range(2, 5), range(5, 5)]  # 2.5 rounds to even


def test_validation_files_and_a_whole_pass(tmp_path):
    train, valid = build([write(tmp_path / "a", 50)], valid=[write(tmp_path / "v", 33, 4)], valid_samples=None)
    tokens = int(valid.sources[0].file.lengths.sum())
    assert len(valid) == (tokens - 1) // SEQ and len(train) == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": []}, "data.train: no token file given"),
        ({"train": [[0.5, "P"], "P"]}, "data.train mixes weighted and plain prefixes"),
        ({"train": [["P", 0.5]]}, r"data.train has \['P', 0.5\]; its entries are prefixes"),
        ({"train": [0.5, "P"]}, "data.train has 0.5; its entries are prefixes"),
        ({"train": [[True, "P"]]}, "data.train has .*; its entries are prefixes"),
        ({"train": [[0.0, "P"]]}, "data.train: weight 0.0 of P is not a positive number; leave the file out"),
        ({"train": [[-1, "P"]]}, "data.train: weight -1.0 of P is not a positive number"),
        ({"train": [[math.inf, "P"]]}, "data.train: weight inf of P is not a positive number"),
        ({"train": [[1, "P"], [math.nan, "P"]]}, "data.train: weight nan of P is not a positive number"),
        ({"train": [[1e308, "P"], [1e308, "P"]]}, "data.train: weights from 1e.308 to 1e.308 have no shares"),
        ({"train": [[5e-324, "P"], [1e10, "P"]]}, "data.train: weights from 5e-324 to .* have no shares"),
        ({"train": [[10**400, "P"]]}, "data.train: weight 1000000000.* is too large"),
        ({"train": ["P\0"]}, r"data.train has 'P\\x00', which has the character"),
        ({"train": ["P"], "valid": [[0, "P"]]}, "data.valid: weight 0.0 of P is not a positive number"),
        ({"train": ["P"], "split": "99;1"}, "data.split: 99;1 is not a split"),
        ({"train": ["P"], "split": [-1, 2]}, r"data.split: \[-1, 2\] is not a split"),
        ({"train": ["P"], "split": "0,0"}, "data.split: 0,0 is not a split"),
        ({"train": ["P"], "split": "1,1", "valid": ["P"]}, "data.split: 1,1 cannot be combined with data.valid"),
        ({"train": ["P"], "split": "999,1", "valid_samples": 4}, "P: 0 of its 20 documents with 0 tokens"),
        ({"train": ["P-missing"]}, "P-missing.idx: no such file"),
    ],
)
def test_user_mistakes_are_one_line(tmp_path, monkeypatch, arguments, message):
    write(tmp_path / "P", 20)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        build(**arguments)
    assert "\n" not in str(caught.value)


def test_forms_of_a_blend():
    assert parse_sources(["a", "b"], "f") == (Source("a"), Source("b"))
    weighted = parse_sources([[3, "a"], (1.0, "b")], "f")
    assert weighted == parse_sources(weighted, "f") == (Source("a", 3.0), Source("b", 1.0))


def test_last_epoch_is_apart_below_eighty_percent():
    # 1001 tokens make 100 samples of 10 in the first epoch: 179 samples need 79 of the second, 180 need 80
    assert plan_cut(1001, 10, 179).separate_final_epoch and not plan_cut(1001, 10, 180).separate_final_epoch


def test_plan_is_exact_for_huge_numbers():
    cut = plan_cut(10**13, 4096, 10**10)
    assert cut.epochs == -(-(10**10 * 4096 + 1) // 10**13) == 5
    assert cut.samples == (5 * 10**13 - 1) // 4096


def test_damaged_lengths_are_refused_not_read():
    rows = np.empty((3, 2), np.int32)
    order = np.array([0, 1], np.int32)
    with pytest.raises(IndexError, match="sequence 1 has a negative length"):
        build_sample_index(np.array([4, -4], np.int32).view(np.uint8), order, 4, rows)
    with pytest.raises(IndexError, match="sequence 1 does not exist"):
        build_sample_index(np.array([4], np.int32).view(np.uint8), order, 4, rows)
    with pytest.raises(IndexError, match="fewer tokens"):
        build_sample_index(np.array([2, 2], np.int32).view(np.uint8), order, 4, rows)


def test_index_is_reused_after_the_data_moved(tmp_path, monkeypatch):
    prefix = write(tmp_path / "a", 80)
    first = build([prefix], cache_dir=tmp_path / "cache")[0]
    for suffix in ("bin", "idx"):
        shutil.move(f"{prefix}.{suffix}", tmp_path / f"renamed.{suffix}")
    monkeypatch.setattr(dataset, "build_indices", lambda *arguments: pytest.fail("was built again"))
    second = build([str(tmp_path / "renamed")], cache_dir=tmp_path / "cache")[0]
    assert samples_of(first, range(50)) == samples_of(second, range(50))
    assert isinstance(second.sources[0].indices["sample_index"].base, np.memmap)


@pytest.mark.parametrize("damage", ["truncate", "remove", "replace"])
def test_damaged_cache_is_built_again(tmp_path, damage):
    def arrays():
        return {"x": np.arange(1000), "y": np.ones((3, 2), np.int16)}

    load_or_build(tmp_path, "key", arrays)
    file = tmp_path / "key" / "x.npy"
    if damage == "truncate":
        os.truncate(file, 500)
    elif damage == "remove":
        file.unlink()
    else:
        np.save(file, np.arange(999))
    found = load_or_build(tmp_path, "key", arrays)
    np.testing.assert_array_equal(found["x"], np.arange(1000))
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def _build_slowly(folder, queue):
    def arrays():
        queue.put(os.getpid())
        time.sleep(0.3)
        return {"x": np.arange(7)}

    queue.put(int(load_or_build(folder, "key", arrays)["x"].sum()))


def test_one_of_many_processes_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_build_slowly, args=(tmp_path, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = sorted(queue.get(timeout=PATIENCE_SECONDS) for _ in range(5))
    for process in processes:
        process.join()
    assert found[:4] == [21] * 4 and found[4] in [process.pid for process in processes]


def test_waiting_for_a_builder_that_hangs_ends_and_tells(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(index_cache, "TELL_SECONDS", 0.05)
    with index_cache.build_lock(tmp_path / "key.lock", 1.0), pytest.raises(UserError) as caught:
        load_or_build(tmp_path, "key", dict, wait_seconds=0.3)
    assert re.search(rf"key\.lock: waited \d+ s for process {os.getpid()} on \S+ to build", str(caught.value))
    assert "waiting for process" in caplog.text


def test_lock_of_a_killed_builder_is_free(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()

    def build_and_hang():
        load_or_build(tmp_path, "key", lambda: started.set() or time.sleep(60) or {})

    process = context.Process(target=build_and_hang)
    process.start()
    started.wait(20)
    process.kill()
    process.join()
    assert load_or_build(tmp_path, "key", lambda: {"x": np.arange(3)}, wait_seconds=5)["x"].tolist() == [0, 1, 2]


def test_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        load_or_build(tmp_path / "file", "key", lambda: {"x": np.arange(3)})


def test_content_key_ignores_the_order_of_fields():
    assert content_key(a=1, b=[2]) == content_key(b=[2], a=1) != content_key(a=1, b=[3])


def test_ranks_that_look_at_once_agree_on_the_folder_beside_the_data(tmp_path):
    """A probe file of one name was removed by one rank under the hands of the next, which then went elsewhere."""
    config = load_config(None, ["--data.train", f'["{tmp_path}/x"]', "--run.dir", str(tmp_path / "run")])
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: index_folder(config), range(2000))) == {tmp_path / "megalite_cache"}
    assert not list((tmp_path / "megalite_cache").iterdir())
