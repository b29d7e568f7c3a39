"""Samples by global number: token files, splits, epochs and blends as one infinite sequence.

`TokenDataset` maps sample number k to its tokens: a pure function of the files' contents, seed, sequence length and the
planned number of samples, identical to Megatron-LM's for the same arguments (`sample_index.py`, `blend.py`). Samples
beyond the plan (needed when a recovery has skipped some) come from continuation indices: further epochs, each shuffled
with its own seed, so the planned order never changes.

Does not import torch.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalite.config.schema import DataConfig
from megalite.config.sources import Source, parse_sources
from megalite.data import _index
from megalite.data.blend import SURPLUS, build_blend, build_exhaustive_blend, normalized, planned_sizes
from megalite.data.index_cache import Arrays, content_key, load_or_build
from megalite.data.indexed import IndexedDataset
from megalite.data.rows import NO_ROW, Row, fill_shifted
from megalite.data.sample_index import Cut, build_indices, parse_split, plan_cut, split_spans
from megalite.errors import UserError

PADDING = -1  # fills a last, partial sample
NO_LIMIT = 1 << 63  # the unsigned form of the smallest negative id
INDEX_FORMAT = 1  # part of every cache key: raise it when the arrays' meaning changes


class SampledFile:
    """One token file, or one split of it, cut into shuffled samples.

    Args:
        file: the open token file.
        span: the sequences to use.
        seq_length: tokens of a sample; one more is read, for the labels.
        seed: seed of the shuffles.
        samples: planned number of samples; None is one epoch.
        cache_dir: folder for the index; None builds it in memory.
        drop_last: False keeps a last sample of fewer tokens, padded with `PADDING`.
    """

    def __init__(
        self,
        file: IndexedDataset,
        span: range,
        seq_length: int,
        seed: int,
        samples: int | None,
        cache_dir: str | Path | None = None,
        drop_last: bool = True,
    ) -> None:
        self.file, self.span, self.seq_length, self.seed = file, span, seq_length, seed
        self._cache_dir = cache_dir
        file.require_lengths()
        tokens = int(file.lengths[span.start : span.stop].sum(dtype=np.int64))
        if tokens < 2:
            raise UserError(
                f"{file.prefix}: {len(span)} of its {len(file)} documents with {tokens} tokens fall to this split;"
                " that makes no sample: use more text or another data.split"
            )
        self.cut = plan_cut(tokens, seq_length, samples, drop_last)
        self._continued_cut = plan_cut(tokens, seq_length, max(1, (tokens - 1) // seq_length))
        self._views = (file.tokens.view(np.uint8), file.dtype.char, file.dtype.itemsize)
        self._index_views = (file.offsets.view(np.uint8), file.lengths.view(np.uint8))
        self._continuations: dict[int, Arrays] = {}
        self._lock = threading.Lock()
        self.indices = self._load(self.seed, self.cut)

    def __len__(self) -> int:
        """Number of samples in the planned epochs; at least the requested number."""
        return self.cut.samples

    def read(self, number: int, tokens: np.ndarray, positions: np.ndarray, documents: np.ndarray) -> tuple[int, int]:
        """Read sample `number` into int64 [seq_length + 1] rows (the last two may be `NO_ROW`).

        Returns the number of tokens and the largest id, where negative ids count as larger than any other.
        """
        order, position, offset = self._locate(number)
        try:
            return _index.gather(
                *self._views, *self._index_views, order, position, offset, tokens, positions, documents
            )
        except IndexError as error:
            raise UserError(f"{self.file.prefix}.idx: {error}; the file is damaged: write it again") from error

    def find(self, number: int, limit: int) -> tuple[int, int]:
        """Document number and id of the first token of sample `number` that is negative or not below `limit`."""
        order, position, offset = self._locate(number)
        while True:
            sequence = int(order[position])
            part = self.file.slice(sequence, offset, int(self.file.lengths[sequence]))
            bad = np.flatnonzero((part < 0) | (part >= limit))
            if bad.size:
                return self.file.document_of(sequence), int(part[bad[0]])
            position, offset = position + 1, 0

    def identity(self) -> dict[str, Any]:
        """Everything that determines the order of the samples, as JSON values without paths."""
        return {
            "file": self.file.fingerprint(),
            "span": [self.span.start, self.span.stop],
            "seq_length": self.seq_length,
            "seed": self.seed,
            "epochs": self.cut.epochs,
            "separate_final_epoch": self.cut.separate_final_epoch,
            "samples": self.cut.samples,
        }

    def _locate(self, number: int) -> tuple[np.ndarray, int, int]:
        """The document order, and the (position, offset) in it where sample `number` begins."""
        arrays, row = self.indices, number
        if number >= self.cut.samples:
            generation, row = divmod(number - self.cut.samples, self._continued_cut.samples)
            arrays = self._continuation(generation + 1)
        position, offset = arrays["sample_index"][arrays["shuffle_index"][row]].tolist()
        return arrays["document_index"], position, offset

    def _continuation(self, generation: int) -> Arrays:
        with self._lock:
            if generation not in self._continuations:
                digest = hashlib.sha256(f"{self.seed} continued {generation}".encode()).digest()
                seed = int.from_bytes(digest[:4], "little")
                self._continuations[generation] = self._load(seed, self._continued_cut)
            return self._continuations[generation]

    def _load(self, seed: int, cut: Cut) -> Arrays:
        def build() -> Arrays:
            return build_indices(self.file, self.span, self.seq_length, seed, cut)

        if self._cache_dir is None:
            return build()
        key = content_key(
            kind="samples",
            format=INDEX_FORMAT,
            file=self.file.fingerprint(),
            span=[self.span.start, self.span.stop],
            seq_length=self.seq_length,
            seed=seed,
            cut=[cut.epochs, cut.separate_final_epoch, cut.samples],
        )
        return load_or_build(self._cache_dir, key, build)


class TokenDataset:
    """The samples of a run by global number: `dataset[k]` is int64 [seq_length + 1].

    Attributes:
        sources: the files drawn from.
        weights: normalised share of each, or None for one unblended file.
        vocab_size: ids >= this are refused when read; negative ones always.

    Any number from 0 on can be read; `len(dataset)` is the planned number of samples.
    """

    separate = False
    columns: tuple[str, ...] = ()

    def __init__(
        self,
        sources: Sequence[SampledFile],
        weights: Sequence[float] | None,
        samples: int | None,
        vocab_size: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.sources, self.vocab_size = list(sources), vocab_size
        self.weights = None if weights is None else list(weights)
        self.seq_length = self.sources[0].seq_length
        if samples is not None and samples < 1:
            raise ValueError(f"a dataset of {samples} samples")
        self._lock = threading.Lock()
        self._blends: list[Arrays] = []
        self._samples = len(self.sources[0]) if samples is None else samples
        if self.weights is not None:
            sizes = [len(source) for source in self.sources]
            self._samples = sum(sizes) if samples is None else samples
            self._blends.append(self._load_blend(sizes if samples is None else None, cache_dir))
            counted = np.bincount(self._blends[0]["dataset_index"], minlength=len(sizes))
            self._counts = counted.astype(np.int64)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, number: int) -> np.ndarray:
        """Token ids of sample `number`, int64 [seq_length + 1]; a last, partial sample ends in `PADDING`."""
        if number < 0:
            raise IndexError(f"sample numbers begin at 0, not {number}")
        tokens = np.empty(self.seq_length + 1, np.int64)
        self.read(number, tokens)
        return tokens

    def read(
        self, number: int, tokens: np.ndarray, positions: np.ndarray = NO_ROW, documents: np.ndarray = NO_ROW
    ) -> None:
        """Read sample `number` into int64 [seq_length + 1] rows: ids, positions in the document, document numbers.

        Raises `UserError` naming file, document and id for an id outside the vocabulary.
        """
        source, inner = self.source_of(number)
        filled, largest = source.read(inner, tokens, positions, documents)
        limit = NO_LIMIT if self.vocab_size is None else self.vocab_size
        if largest >= limit:
            document, token = source.find(inner, limit)
            raise UserError(
                f"{source.file.prefix}.bin: document {document}: token id {token} is outside the vocabulary of {limit}"
                " (model.vocab_size); tokenize with the tokenizer of this model"
            )
        tokens[filled:] = PADDING
        if positions.size:
            positions[filled:] = 0
            documents[filled:] = documents[filled - 1] + 1  # padding attends only to padding

    def fill(self, number: int, row: Row) -> None:
        """Write sample `number` as S tokens and the S that follow each; see `megalite.data.rows.Rows`."""
        fill_shifted(self.read, number, row)

    def source_of(self, number: int) -> tuple[SampledFile, int]:
        """The file that sample `number` comes from, and its sample number within the file."""
        if self.weights is None:
            return self.sources[0], number
        segment, row = divmod(number, self._samples)
        if segment >= len(self._blends):
            self._continue_blend(segment)
        blend = self._blends[segment]
        return self.sources[int(blend["dataset_index"][row])], int(blend["dataset_sample_index"][row])

    def identity(self) -> dict[str, Any]:
        """Everything that determines the order of the samples: equal if and only if the order is equal."""
        return {"sources": [source.identity() for source in self.sources], "weights": self.weights}

    def fingerprint(self) -> str:
        """Hash of `identity()`, independent of paths and layout."""
        return content_key(**self.identity())

    def fields(self) -> dict[str, Any]:
        """What determines the order, by recipe field, for checkpoints: so that a difference can be reported by name.

        JSON values. `order` is the fingerprint of all of it, including the planned number of samples.
        """
        shares = self.weights or [1.0]
        return {
            "order": self.fingerprint(),
            "train.seq_length": self.seq_length,
            "run.seed": self.sources[0].seed,
            **{
                f"data.train[{number}]": {
                    "fingerprint": source.file.fingerprint()[:16],
                    "sequences": [source.span.start, source.span.stop],
                    "share": round(share, 6),
                }
                for number, (source, share) in enumerate(zip(self.sources, shares, strict=True))
            },
        }

    def blend(self) -> Arrays:
        """The planned blend's arrays; empty for a single file."""
        return self._blends[0] if self._blends else {}

    def _load_blend(self, sizes: list[int] | None, cache_dir: str | Path | None) -> Arrays:
        assert self.weights is not None
        weights = self.weights

        def build() -> Arrays:
            return build_blend(weights, self._samples) if sizes is None else build_exhaustive_blend(sizes)

        exact = [weight.hex() for weight in weights]
        key = content_key(kind="blend", format=INDEX_FORMAT, weights=exact, samples=self._samples, sizes=sizes)
        return load_or_build(cache_dir, key, build)

    def _continue_blend(self, segment: int) -> None:
        assert self.weights is not None
        with self._lock:
            while len(self._blends) <= segment:
                self._blends.append(build_blend(self.weights, self._samples, self._counts))


def build_datasets(
    data_config: DataConfig,
    *,
    seq_length: int,
    seed: int,
    train_samples: int,
    valid_samples: int | None,
    vocab_size: int | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[TokenDataset, TokenDataset | None]:
    """Open the files of a recipe's `data` section as training and validation samples.

    Args:
        data_config: `train`, `valid`: prefixes or (weight, prefix) pairs; `split`: shares such as [99, 1, 0] that
            divide the files of `train`. `valid` and `split` are mutually exclusive.
        seq_length, seed: of the samples and their shuffles.
        train_samples: number of samples the run was first planned for. More can be read.
        valid_samples: planned number of validation samples; 0 for none, None for all of them once.
        vocab_size: refuse token ids >= this.
        cache_dir: folder for indices, shared by the processes of a node; None keeps them in memory.

    Returns:
        The training samples, and the validation samples if any.
    """
    if data_config.valid and data_config.split:
        raise UserError(
            f"data.split: {data_config.split} cannot be combined with data.valid; leave one of the two empty"
        )
    sampling = SampleOrder(seq_length, seed, vocab_size, cache_dir)
    train = parse_sources(data_config.train, "data.train")
    valid = parse_sources(data_config.valid, "data.valid")
    if not train:
        raise UserError("data.train: no token file given; give prefixes of .bin/.idx files")
    if not data_config.split:
        training = sampling.dataset(train, train_samples)
        return training, sampling.dataset(valid, valid_samples) if valid and valid_samples != 0 else None
    training = sampling.dataset(train, train_samples, data_config.split, 0)
    if parse_split(data_config.split)[1] == 0 or valid_samples == 0:
        return training, None
    return training, sampling.dataset(train, valid_samples, data_config.split, 1)


@dataclass(frozen=True)
class SampleOrder:
    """How token files are turned into samples: the arguments that training and validation share."""

    seq_length: int
    seed: int
    vocab_size: int | None = None
    cache_dir: str | Path | None = None

    def dataset(
        self, given: Sequence[Source], samples: int | None, split: str | Sequence[float] = "", part: int = 0
    ) -> TokenDataset:
        """Open token files, or one part of their split, by Megatron-LM's rules.

        A single file is not blended unless it has a weight and is split. With weights, each file's index covers its
        share of the samples plus 0.5 %; without, one epoch of each is mixed in proportion to their sizes. `samples`
        None takes every sample of one epoch once, whatever the weights.
        """
        files = [IndexedDataset(source.prefix) for source in given]
        spans = [split_spans(split, len(file))[part] if split else range(len(file)) for file in files]
        shares = [source.weight for source in given if source.weight is not None]
        weights = normalized(shares) if shares and samples is not None else None
        unblended = len(files) == 1 and (weights is None or not split)
        built: Sequence[int | None] = [samples if unblended else None] * len(files)
        target = samples
        if weights is not None and samples is not None and not unblended:
            built, target = planned_sizes(weights, samples, SURPLUS), sum(planned_sizes(weights, samples))
        with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
            sources = list(pool.map(self._sampled, files, spans, built))
        if unblended:
            return TokenDataset(sources, None, samples, self.vocab_size, self.cache_dir)
        weights = normalized([len(source) for source in sources] if weights is None else weights)
        return TokenDataset(sources, weights, target, self.vocab_size, self.cache_dir)

    def _sampled(self, file: IndexedDataset, span: range, samples: int | None) -> SampledFile:
        return SampledFile(file, span, self.seq_length, self.seed, samples, self.cache_dir)
