"""A feed-forward layer without a gate: down(relu(up(x))^2), So et al. 2021 (Primer, arXiv:2109.08668).

S sequence, s its part outside tensor-parallel blocks, B micro-batch, H hidden, f this rank's part of the inner width.

    [model]
    feed_forward = "relu2:SquaredReLU"
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from megalite.model.build import Build
from megalite.placement import row_box, split_evenly


def squared_relu(x: Tensor) -> Tensor:
    return functional.relu(x).square()


class SquaredReLU(nn.Module):
    """hidden [s, B, H] -> [s, B, H]."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        hidden, ffn = build.model.hidden_size, build.model.ffn_hidden_size
        start, length = split_evenly(ffn, build.mesh.tp, build.mesh.index("tp"))
        prefix = f"model.layers.{layer}.mlp"
        box = row_box(f"{prefix}.up_proj.weight", (ffn, hidden), start, length, 0, (build.mesh.rank,))
        self.up = build.column((box,))
        self.down = build.row(f"{prefix}.down_proj.weight", (hidden, ffn), (start, length))

    def forward(self, x_sBH: Tensor, *, recompute: bool = False) -> Tensor:
        up_SBf = self.up(x_sBH)
        if recompute:
            return self.down(up_SBf, prologue=squared_relu)
        return self.down(squared_relu(up_SBf))
