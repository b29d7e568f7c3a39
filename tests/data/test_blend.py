"""The C++ blend against its definition in a few lines of Python, for few and many datasets (two implementations)."""

import numpy as np
import pytest

from megalite.data import _index
from megalite.data.blend import SURPLUS, build_blend, build_exhaustive_blend, normalized, planned_sizes

pytestmark = pytest.mark.fast


def reference(weights, limits, samples):
    counts, chosen, taken = np.zeros(len(weights), np.int64), [], []
    for sample in range(samples):
        error = np.array(weights) * float(max(sample, 1)) - counts
        error[counts >= limits] = -np.inf
        pick = int(np.argmax(error))
        chosen.append(pick)
        taken.append(int(counts[pick]))
        counts[pick] += 1
    return chosen, taken


@pytest.mark.parametrize("datasets", [1, 2, 5, 12, 13, 16, 31, 64, 65, 130, 200])
def test_blend_is_its_definition(datasets):
    rng = np.random.default_rng()
    for weights in (rng.random(datasets) ** 3 + 1e-3, np.ones(datasets)):  # equal weights: every choice is a tie
        shares = normalized(weights.tolist())
        samples = 3 * datasets + 200
        found = build_blend(shares, samples)
        chosen, taken = reference(shares, np.full(datasets, samples), samples)
        assert found["dataset_index"].tolist() == chosen
        assert found["dataset_sample_index"].tolist() == taken
        assert (found["dataset_index"].dtype, found["dataset_sample_index"].dtype) == (np.int16, np.int64)


@pytest.mark.parametrize("datasets", [1, 3, 12, 13, 40, 70])
def test_exhaustive_blend_takes_everything_once(datasets):
    sizes = np.random.default_rng().integers(1, 40, datasets)
    found = build_exhaustive_blend(sizes.tolist())
    pairs = set(zip(found["dataset_index"].tolist(), found["dataset_sample_index"].tolist()))
    assert pairs == {(number, sample) for number, size in enumerate(sizes) for sample in range(size)}
    assert found["dataset_index"].tolist() == reference(sizes / sizes.sum(), sizes, int(sizes.sum()))[0]


@pytest.mark.parametrize("datasets", [3, 20])
def test_asking_for_more_than_the_datasets_hold_is_refused(datasets):
    counts, out = np.zeros(datasets, np.int64), np.empty(2 * datasets + 1, np.int64)
    limits = np.full(datasets, 2)
    with pytest.raises(IndexError, match="more samples than its datasets hold"):
        _index.build_blend(np.full(datasets, 1 / datasets), limits, counts, 0, out.astype(np.int16), out)


def test_sizes_have_megatrons_surplus():
    assert planned_sizes([0.75, 0.25], 1000) == [750, 250]
    assert planned_sizes([0.75, 0.25], 1000, SURPLUS) == [754, 252]
    assert planned_sizes([1 / 3, 2 / 3], 10, SURPLUS) == [5, 8]
