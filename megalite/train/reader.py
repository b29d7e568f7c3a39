"""Where a run's samples come from, and which ranks read them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megalite.config import Config
from megalite.data.batches import Batch, Batches
from megalite.data.dataset import TokenDataset, build_datasets
from megalite.mesh import Mesh
from megalite.train.trainer import Trainer


def index_folder(config: Config) -> Path:
    """Where sample indices are kept: `data.cache_dir`, else beside the first token file, else in the run directory."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir)
    first = next(entry for entry in config.data.train if not isinstance(entry, int | float))
    prefix = Path(first if isinstance(first, str) else first[-1])
    beside = prefix.parent / "megalite_cache"
    with contextlib.suppress(OSError):
        beside.mkdir(exist_ok=True)
        probe = beside / ".writable"
        probe.touch()
        probe.unlink()
        return beside
    return Path(config.run.dir) / "cache"


def open_data(config: Config) -> tuple[TokenDataset, TokenDataset | None]:
    """The training and validation samples of a run."""
    return build_datasets(
        config.data,
        seq_length=config.train.seq_length,
        seed=config.run.seed,
        train_samples=config.samples_after(config.train.steps),
        valid_samples=config.train.eval_samples if config.train.eval_interval else 0,
        vocab_size=config.model.vocab_size,
        cache_dir=index_folder(config),
    )


class Reader:
    """This rank's micro-batches; ranks in the middle of the pipeline read nothing and get None for each."""

    def __init__(
        self, config: Config, mesh: Mesh, trainer: Trainer, dataset: TokenDataset | None, eod: int | None
    ) -> None:
        self.config = config
        self.per_step = config.train.micro_batch_size * mesh.dp
        self._batches: Batches | None = None
        if dataset is not None and (trainer.needs_batches or config.data.document_mask):
            self._batches = Batches(
                dataset,
                micro_batch_size=config.train.micro_batch_size,
                dp_rank=mesh.index("dp"),
                dp_size=mesh.dp,
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
