"""The data loader of a rank: which ranks read samples, and their share of each batch."""

from __future__ import annotations

from megalite.config import Config
from megalite.data.batch import Batch
from megalite.data.batches import Batches
from megalite.data.examples import PromptDataset
from megalite.data.rows import Rows
from megalite.mesh import Mesh
from megalite.train.trainer import Trainer


class Reader:
    """This rank's micro-batches. Ranks in the middle of the pipeline get None for each one, unless attention needs to
    know the documents. Prompts are no batches: whoever answers them reads them."""

    def __init__(
        self, config: Config, mesh: Mesh, trainer: Trainer, dataset: Rows | PromptDataset | None, eod: int | None
    ) -> None:
        self.config = config
        parts = config.train.invariant or mesh.samples_size
        self._own_parts = parts // mesh.samples_size
        self.per_step = config.train.micro_batch_size * parts
        self._batches: list[Batches] = []
        if dataset is None or isinstance(dataset, PromptDataset):
            return
        if trainer.needs_batches or config.data.document_mask or dataset.separate:
            self._batches = [
                Batches(
                    dataset,
                    micro_batch_size=config.train.micro_batch_size,
                    dp_rank=mesh.samples_index * self._own_parts + part,
                    dp_size=parts,
                    device=mesh.device,
                    document_mask=config.data.document_mask,
                    end_of_document=eod if config.data.mask_end_of_document else None,
                )
                for part in range(self._own_parts)
            ]

    def read(self, first: int, samples: int) -> list[Batch] | list[None]:
        """The micro-batches of the samples [first, first + samples): of one part of the batch after the other, where
        this rank has several (`train.invariant`)."""
        if not self._batches:
            return [None] * (-(-samples // self.per_step) * self._own_parts)
        return [batch for part in self._batches for batch in part.next_batch(first, samples)]

    def close(self) -> None:
        for part in self._batches:
            part.close()
