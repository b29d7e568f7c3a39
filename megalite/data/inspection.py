"""Inspection of a token file: statistics, a histogram of lengths, and checksums of its sample order."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalite.config.sources import parse_sources
from megalite.data.dataset import SampleOrder
from megalite.data.indexed import IndexedDataset
from megalite.errors import UserError

SAMPLED_LENGTHS = 1 << 24  # maximum number of lengths for percentiles; more are subsampled evenly
PERCENTILES = (0, 10, 50, 90, 99, 100)
INDEX_NAMES = ("document_index", "sample_index", "shuffle_index")


@dataclass(frozen=True)
class Statistics:
    """Counts of a token file.

    Attributes:
        documents, empty_documents, sequences, tokens: counts.
        percentiles: tokens of a sequence at each of `PERCENTILES` (from an even subsample above 2^24 sequences).
        histogram: number of sequences of 2^i to 2^(i+1) - 1 tokens, [bins].
    """

    documents: int
    empty_documents: int
    sequences: int
    tokens: int
    percentiles: tuple[int, ...]
    histogram: tuple[int, ...]


def statistics(dataset: IndexedDataset) -> Statistics:
    """Scan the index (not the tokens) in bounded memory."""
    bins = np.zeros(33, np.int64)
    step = -(-len(dataset) // SAMPLED_LENGTHS) or 1
    selection = []
    for lengths in dataset.pieces("lengths"):
        # frexp gives the number of binary digits exactly; a logarithm would round
        digits = np.frexp(lengths.astype(np.float64))[1]
        bins += np.bincount(np.maximum(digits - 1, 0), minlength=bins.size)
        selection.append(lengths[::step].copy())
    empty, previous = 0, -1
    for boundaries in dataset.pieces("boundaries"):
        empty += int((np.diff(boundaries, prepend=previous) == 0).sum())
        previous = int(boundaries[-1])
    percentiles: tuple[int, ...] = ()
    if selection:
        found = np.percentile(np.concatenate(selection), PERCENTILES, method="nearest")
        percentiles = tuple(int(value) for value in found)
    used = int(np.flatnonzero(bins)[-1]) + 1 if bins.any() else 0
    return Statistics(
        dataset.documents, empty, len(dataset), dataset.tokens.size, percentiles, tuple(bins[:used].tolist())
    )


def histogram_lines(histogram: Sequence[int], width: int = 50) -> list[str]:
    """The histogram as text: one line per bin, bars relative to the fullest."""
    if not histogram:
        return []
    top = max(histogram)
    lines = []
    for power, count in enumerate(histogram):
        bar = "█" * round(width * count / top) or ("▏" if count else "")
        lines.append(f"{1 << power:>11,} – {(2 << power) - 1:<11,} {count:>13,} {bar}")
    return lines


def order(
    prefixes: Sequence[str], *, seq_length: int, samples: int, seed: int, weights: Sequence[float] = ()
) -> dict[str, Any]:
    """The order in which `samples` training samples are read from whole token files, as checksums.

    Returns:
        `document_index`, `sample_index`, `shuffle_index`: sha256 (hex) of Megatron-LM's `GPTDataset` arrays; for
        several files, of their concatenated arrays. `blend`, for several files: sha256 of
        `BlendedDataset`'s dataset_index (int16) followed by its dataset_sample_index (int64). `files`: the first three
        of each file. `tokens` and `labels`: the ids of the first sample, seq_length each.
    """
    if weights and len(weights) != len(prefixes):
        raise UserError(f"--weights: {len(weights)} weights for {len(prefixes)} prefixes; give one each, or none")
    sources = parse_sources(list(zip(weights, prefixes, strict=True)) if weights else prefixes, "--weights")
    for name, value in (("--seq-length", seq_length), ("--samples", samples)):
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    if not 0 <= seed < 1 << 32:
        raise UserError(f"--seed {seed}: must be from 0 to {(1 << 32) - 1}")
    dataset = SampleOrder(seq_length, seed).dataset(sources, samples)
    result: dict[str, Any] = {
        name: _sha256(*[source.indices[name] for source in dataset.sources]) for name in INDEX_NAMES
    }
    if blend := dataset.blend():
        result["blend"] = _sha256(blend["dataset_index"], blend["dataset_sample_index"])
        result["files"] = [
            {"prefix": source.file.prefix, **{name: _sha256(source.indices[name]) for name in INDEX_NAMES}}
            for source in dataset.sources
        ]
    first = dataset[0].tolist()
    return {**result, "tokens": first[:-1], "labels": first[1:]}


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
    return digest.hexdigest()
