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
        self.per_step = config.train.micro_batch_size * mesh.samples_size
        self._batches: Batches | None = None
        if dataset is None or isinstance(dataset, PromptDataset):
            return
        if trainer.needs_batches or config.data.document_mask or dataset.separate:
            self._batches = Batches(
                dataset,
                micro_batch_size=config.train.micro_batch_size,
                dp_rank=mesh.samples_index,
                dp_size=mesh.samples_size,
                device=mesh.device,
                document_mask=config.data.document_mask,
                end_of_document=eod if config.data.mask_end_of_document else None,
            )

    def read(self, first: int, samples: int) -> list[Batch] | list[None]:
        if self._batches is None:
            return [None] * -(-samples // self.per_step)
        return self._batches.next_batch(first, samples)

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
