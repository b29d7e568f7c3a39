"""Which tokens are sample k: document order, sample boundaries and shuffle, equal to Megatron-LM's `GPTDataset`.

For the same lengths, seed, sequence length and number of samples, the three arrays are those of
`megatron/core/datasets/gpt_dataset.py`, value for value and dtype for dtype, so that a run can move over and keep its
data order. The algorithm: as many epochs of the documents as the samples need are shuffled as one list (the last epoch
apart from the others where less than 80 % of it is needed), cut into samples of `seq_length` tokens that share one
token with their neighbour, and the samples are shuffled. One `numpy.random.RandomState` serves all shuffles in turn.

The one difference: where the last, partial sample is kept (`drop_last=False`), Megatron-LM's `helpers.cpp` rounds the
number of tokens to a 32-bit float before it divides. Above 2^24 tokens that can lose the last sample or invent one
(100,000,002 tokens in samples of 1000: 100,000 there, 100,001 in truth). Here the count is exact integer arithmetic.

Nothing here imports torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megalite.data import _index
from megalite.data.index_cache import Arrays
from megalite.data.indexed import IndexedDataset
from megalite.errors import UserError

SEPARATE_BELOW = 0.80  # a last epoch of which less is needed is shuffled apart, so that the others stay whole
MAX_SEQUENCES = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Cut:
    """How a stream of tokens is cut into samples.

    Attributes:
        tokens_per_epoch: tokens of all documents once.
        epochs: how many times the documents are gone through.
        separate_final_epoch: the last epoch's documents and samples are shuffled apart from the others'.
        samples: number of samples in all epochs, at least as many as were asked for.
        samples_before_final: number of samples that are shuffled together first.
    """

    tokens_per_epoch: int
    epochs: int
    separate_final_epoch: bool
    samples: int
    samples_before_final: int


def plan_cut(tokens_per_epoch: int, seq_length: int, samples: int | None, drop_last: bool = True) -> Cut:
    """Plan at least `samples` samples of `seq_length` + 1 tokens, or one epoch where `samples` is None.

    Without `drop_last` a last sample of fewer tokens counts, too. Raises `ValueError` if there is no token.
    """
    if tokens_per_epoch < 1 or seq_length < 1:
        raise ValueError(f"{tokens_per_epoch} tokens cannot be cut in samples of {seq_length}")
    needed = 1 if samples is None else samples * seq_length + 1
    epochs = max(1, -(-needed // tokens_per_epoch))
    total = (epochs * tokens_per_epoch - 1) // seq_length
    if not drop_last:
        total = -(-(epochs * tokens_per_epoch - 1) // seq_length)
    before_final, separate = total, False
    if epochs > 1 and samples is not None:
        without_final = ((epochs - 1) * tokens_per_epoch - 1) // seq_length
        per_epoch = (tokens_per_epoch - 1) // seq_length
        if samples - without_final < int(SEPARATE_BELOW * per_epoch):
            before_final, separate = without_final, True
    return Cut(tokens_per_epoch, epochs, separate, total, before_final)


def build_indices(dataset: IndexedDataset, span: range, seq_length: int, seed: int, cut: Cut) -> Arrays:
    """Build the three arrays for the sequences `span` of a token file.

    Returns:
        `document_index` int32 [epochs * len(span)]: sequence numbers in the order they are read.
        `sample_index` int32 (int64 for more than 2^31 - 1 documents) [samples + 1, 2]: position in `document_index`
        and token offset there at which each sample begins.
        `shuffle_index` uint32 (int64 for 2^32 - 2 samples and more) [samples]: the k-th sample of the epoch plan.
    """
    if len(dataset) > MAX_SEQUENCES:
        raise UserError(f"{dataset.prefix}.idx: {len(dataset)} sequences; at most {MAX_SEQUENCES} can be indexed")
    random = np.random.RandomState(seed)
    sequences = np.arange(span.start, span.stop, dtype=np.int32)
    first = np.tile(sequences, cut.epochs - cut.separate_final_epoch)
    random.shuffle(first)
    document_index = first
    if cut.separate_final_epoch:
        random.shuffle(sequences)
        document_index = np.concatenate((first, sequences))

    row_dtype = np.int32 if document_index.size <= np.iinfo(np.int32).max else np.int64
    sample_index = np.empty((cut.samples + 1, 2), row_dtype)
    _index.build_sample_index(dataset.lengths.view(np.uint8), document_index, seq_length, sample_index)

    shuffle_dtype = np.uint32 if cut.samples < np.iinfo(np.uint32).max - 1 else np.int64
    shuffle_index = np.arange(cut.samples, dtype=shuffle_dtype)
    random.shuffle(shuffle_index[: cut.samples_before_final])
    if cut.samples_before_final < cut.samples:
        random.shuffle(shuffle_index[cut.samples_before_final :])
    return {"document_index": document_index, "sample_index": sample_index, "shuffle_index": shuffle_index}


def parse_split(split: str | Sequence[float]) -> tuple[float, ...]:
    """Normalised shares of training, validation and test of "99,1,0" or [99, 1, 0]. Raises `UserError`."""
    try:
        parts = split.split(",") if isinstance(split, str) else split
        shares = np.array([float(part) for part in parts], np.float64)
    except ValueError:
        shares = np.array([-1.0])
    if not 1 <= shares.size <= 3 or not 0 < sum(shares.tolist()) < math.inf or shares.min() < 0:
        raise UserError(f"data.split: {split} is not a split; give shares of training, validation, test like 99,1,0")
    shares = np.concatenate((shares, np.zeros(3 - shares.size)))
    return tuple((shares / shares.sum()).tolist())


def split_spans(split: str | Sequence[float], sequences: int) -> list[range]:
    """The sequences of training, validation and test: bounds are the rounded running sums of the shares."""
    bounds, end = [0], 0.0
    for share in parse_split(split):
        end += share
        bounds.append(round(end * float(sequences)))
    return [range(start, stop) for start, stop in pairwise(bounds)]
