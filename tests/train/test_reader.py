"""Which samples each rank of a layout reads."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from megalite.data.rows import Row
from megalite.mesh import Mesh
from megalite.train.reader import Reader
from tests.support.parity import Case

pytestmark = pytest.mark.fast


class Numbers:
    """Samples that hold their own number."""

    seq_length, columns, separate = 12, (), False

    def __len__(self) -> int:
        return 100

    def fill(self, number: int, row: Row) -> None:
        row.tokens_S[:], row.labels_S[:] = np.full(12, number), number


@pytest.mark.parametrize(
    "sizes", [{"dp": 4}, {"dp": 2, "tp": 2}, {"dp": 2, "ep": 2}, {"dp": 2, "cp": 2, "pp": 2}, {"tp": 4}]
)
def test_the_ranks_of_a_model_share_samples_and_the_others_have_their_own(sizes):
    config = Case.of({"train.global_batch_size": 8, "train.micro_batch_size": 2}).config(1)
    read: Counter[int] = Counter()
    world = Mesh(**sizes).size
    for rank in range(world):
        mesh = Mesh(**sizes, rank=rank)
        reader = Reader(config, mesh, SimpleNamespace(needs_batches=True), Numbers(), None)
        batches = reader.read(16, 8)
        reader.close()
        read.update(int(row[0]) for batch in batches for row in batch.tokens_BS)
    samples = Mesh(**sizes).samples_size
    assert read == dict.fromkeys(range(16, 24), world // samples)
