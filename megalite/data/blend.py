"""Mixing token files by weight, identical to Megatron-LM's `BlendedDataset`.

Sample k of a blend comes from the file that is furthest behind its share, weight * k - samples taken so far; the first
one in a tie (`megatron/core/datasets/blended_dataset.py`, `helpers.cpp`). The rule depends only on earlier samples, so
a longer blend begins with the shorter one: samples beyond the plan extend it without changing it.

Does not import torch.
"""

import math
from collections.abc import Sequence

import numpy as np

from megalite.data import _index
from megalite.data.index_cache import Arrays

SURPLUS = 0.005  # Megatron-LM's mid_level_dataset_surplus
UNLIMITED = np.iinfo(np.int64).max


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, in float64."""
    array = np.array(weights, np.float64)
    return (array / array.sum()).tolist()


def planned_sizes(weights: Sequence[float], samples: int, surplus: float = 0.0) -> list[int]:
    """Samples of each dataset for a blend of about `samples`; with `SURPLUS`, the number to build indices for."""
    return [math.ceil(math.ceil(samples * weight) * (1 + surplus)) for weight in weights]


def build_blend(weights: Sequence[float], samples: int, counts: np.ndarray | None = None) -> Arrays:
    """Build the blend of normalised `weights`.

    Args:
        weights: shares that add up to 1; they enter the comparison as they are, bit for bit.
        samples: number of samples.
        counts: int64 [datasets], samples already taken from each by the preceding part of the blend; updated in
            place. Default: zeros.

    Returns:
        `dataset_index` int16 [samples]: which dataset; `dataset_sample_index` int64 [samples]: which sample of it.
    """
    taken = np.zeros(len(weights), np.int64) if counts is None else counts
    limits = np.full(len(weights), UNLIMITED)
    return _run(np.array(weights, np.float64), limits, taken, int(taken.sum()), samples)


def build_exhaustive_blend(sizes: Sequence[int]) -> Arrays:
    """Build the blend that takes every sample of every dataset once, always in proportion to their sizes."""
    limits = np.array(sizes, np.int64)
    return _run(limits / limits.sum(), limits, np.zeros_like(limits), 0, int(limits.sum()))


def _run(weights: np.ndarray, limits: np.ndarray, counts: np.ndarray, first: int, samples: int) -> Arrays:
    dataset_index = np.empty(samples, np.int16)
    dataset_sample_index = np.empty(samples, np.int64)
    _index.build_blend(weights, limits, counts, first, dataset_index, dataset_sample_index)
    return {"dataset_index": dataset_index, "dataset_sample_index": dataset_sample_index}
