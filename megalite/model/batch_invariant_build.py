"""The build context of a model in which a token's numbers do not depend on the batch (`train.batch_invariant`).

What is left to the compiled kernels (norms, rotations, SwiGLU, cross-entropy) computes every row by itself.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megalite.errors import UserError
from megalite.kernels.attention.batch_invariant import BatchInvariantAttention
from megalite.model.build import Build
from megalite.model.head import VocabParallelHead
from megalite.parallel.row_blocks import RowBlocks

_BY_ROW = ("rms_norm", "rope", "swiglu", "cross_entropy")


class BatchInvariantHead(VocabParallelHead):
    """The output layer, with logits of one token whatever the others."""

    def local_logits(self, hidden_nH: Tensor) -> Tensor:
        return self._bounded(RowBlocks().output(hidden_nH, self.weight.gathered(), None))


@dataclass(frozen=True)
class BatchInvariantBuild(Build):
    """Raises UserError where a kernel does not compute rows by themselves."""

    make_head: ClassVar[type[VocabParallelHead]] = BatchInvariantHead

    def __post_init__(self) -> None:
        for operation in _BY_ROW:
            if self.kernels.taken(operation) != "native":
                raise UserError(
                    f"train.batch_invariant = true needs the compiled kernels, and kernels.{operation} is "
                    f"{self.kernels.choices[operation]}; install them (pip install -e .), or use false"
                )
        attention = BatchInvariantAttention(self.kernels.attention_parts)
        object.__setattr__(self, "kernels", dataclasses.replace(self.kernels, attention=attention))
        object.__setattr__(self, "products", RowBlocks())
