"""Micro-batches by global sample number, prefetched in the background.

The global batch that begins at sample n is the samples n, n + 1, ... in every layout. Micro-batch m is
`micro_batch_size * dp_size` consecutive samples, of which data-parallel rank r takes the r-th slice (as Megatron-LM's
sampler does, so the data order is the same). The position in the data is one integer, and a run can resume with a
different number of ranks.

Shapes: B samples of a micro-batch, S tokens of a sequence.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from megalite.data.batch import Batch
from megalite.data.rows import Row, Rows
from megalite.kernels.cross_entropy import IGNORE_INDEX


class Batches:
    """Reads this rank's micro-batches of any global batch, and prefetches the following ones.

    Args:
        dataset: the samples: of token files, or packed examples.
        micro_batch_size: samples of one micro-batch on one rank.
        dp_rank, dp_size: this rank's index among those that share the global batch.
        device: where the batches go; for CUDA they are read into pinned memory first.
        document_mask: fill `positions_BS` and `documents_BS`, as is always done for a dataset with `separate`.
        end_of_document: leave the label that follows this token (the next document's first) out of the loss.
        ahead: number of steps to prefetch.

    Reads in one background thread; its errors are raised by the `next_batch` call for that batch. Close it, or use it
    as a context manager.
    """

    def __init__(
        self,
        dataset: Rows,
        *,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        device: torch.device | str = "cpu",
        document_mask: bool = False,
        end_of_document: int | None = None,
        ahead: int = 2,
    ) -> None:
        self.dataset, self.micro_batch_size = dataset, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.device = torch.device(device)
        self._document_mask, self._end_of_document = document_mask or dataset.separate, end_of_document
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._pending: dict[tuple[int, int], Future[list[Batch]]] = {}

    def next_batch(
        self, first_sample: int, samples: int, upcoming: Sequence[tuple[int, int]] | None = None
    ) -> list[Batch]:
        """This rank's micro-batches of the global batch of `samples` samples from number `first_sample` on.

        If `samples` is not a multiple of a global micro-batch, the last one is padded with rows without labels.
        `upcoming` are the (first sample, samples) of the next calls; by default the same number of samples, up to the
        end of the plan. A wrong guess only costs time.
        """
        key = (first_sample, samples)
        wanted = [key, *(self._guess(*key) if upcoming is None else upcoming)]
        for stale in [known for known in self._pending if known not in wanted]:
            self._pending.pop(stale).cancel()
        for request in wanted:
            if request not in self._pending:
                self._pending[request] = self._pool.submit(self._read, *request)
        batches = self._pending.pop(key).result()
        return batches if self.device.type == "cpu" else [batch.to(self.device) for batch in batches]

    def close(self) -> None:
        """Stop reading; returns when the thread has ended."""
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _guess(self, first: int, samples: int) -> list[tuple[int, int]]:
        guesses = [(first + step * samples, samples) for step in range(1, self._ahead + 1)]
        # samples beyond the plan need another index, which is not built for a guess
        return [guess for guess in guesses if sum(guess) <= len(self.dataset) or first >= len(self.dataset)]

    def _read(self, first_sample: int, samples: int) -> list[Batch]:
        block = self.micro_batch_size * self.dp_size
        starts = range(first_sample + self.dp_rank * self.micro_batch_size, first_sample + samples, block)
        count = -(-samples // block)
        end = first_sample + samples
        batches = [self._micro_batch(range(start, min(start + self.micro_batch_size, end))) for start in starts]
        return batches + [self._micro_batch(range(0)) for _ in range(count - len(batches))]

    def _micro_batch(self, numbers: range) -> Batch:
        shape = (self.micro_batch_size, self.dataset.seq_length)
        pinned = self.device.type == "cuda"
        names = ("tokens", "labels", "positions", "documents")[: 4 if self._document_mask else 2]
        whole = {f"{name}_BS": torch.zeros(shape, dtype=torch.int64, pin_memory=pinned) for name in names}
        columns = {name: torch.zeros(shape, dtype=torch.float32, pin_memory=pinned) for name in self.dataset.columns}
        tokens_BS, labels_BS = whole["tokens_BS"].numpy(), whole["labels_BS"].numpy()
        labels_BS[len(numbers) :] = IGNORE_INDEX
        for index, number in enumerate(numbers):
            own = {f"{name}_S": whole[f"{name}_BS"][index].numpy() for name in names}
            self.dataset.fill(number, Row(**own, columns={name: columns[name][index].numpy() for name in columns}))
        labels_BS[labels_BS < 0] = IGNORE_INDEX
        tokens_BS[tokens_BS < 0] = 0
        if self._end_of_document is not None:
            labels_BS[: len(numbers)][tokens_BS[: len(numbers)] == self._end_of_document] = IGNORE_INDEX
        return Batch(**whole, columns=columns)
