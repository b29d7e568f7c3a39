"""The feed-forward layer.

S sequence, s its part outside tensor-parallel blocks, B micro-batch, H hidden, F feed-forward, f this rank's part.
"""

from __future__ import annotations

from torch import Tensor, nn

from megalite.model.build import Build
from megalite.placement import row_box, split_evenly


class GatedFeedForward(nn.Module):
    """hidden [s, B, H] -> down(silu(gate(x)) * up(x)) [s, B, H], gate and up in one product (Shazeer 2020).

    `prefix` begins the global names of its matrices, `ffn` is the inner width.
    """

    def __init__(self, build: Build, prefix: str, ffn: int) -> None:
        super().__init__()
        hidden, mesh = build.model.hidden_size, build.mesh
        start, length = split_evenly(ffn, mesh.tp, mesh.index("tp"))
        boxes = tuple(
            row_box(f"{prefix}.{name}.weight", (ffn, hidden), start, length, row, (mesh.rank,))
            for name, row in (("gate_proj", 0), ("up_proj", length))
        )
        self.kernels = build.kernels
        self.gate_up = build.column(boxes)
        self.down = build.row(f"{prefix}.down_proj.weight", (hidden, ffn), (start, length))

    def forward(self, x_sBH: Tensor, *, recompute: bool = False) -> Tensor:
        gate_up_SBf = self.gate_up(x_sBH)
        if recompute:
            return self.down(gate_up_SBf, prologue=self.kernels.swiglu)
        return self.down(self.kernels.swiglu(gate_up_SBf))


class SwiGLU(GatedFeedForward):
    """The dense layer of the Llama family."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, f"model.layers.{layer}.mlp", build.model.ffn_hidden_size)
