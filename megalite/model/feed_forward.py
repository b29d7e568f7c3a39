"""The feed-forward layer.

S sequence, s its part outside tensor-parallel blocks, B micro-batch, H hidden, F feed-forward, f this rank's part.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megalite.kernels import Kernels
from megalite.model.build import Build
from megalite.parallel.linear import FusedPrologue
from megalite.placement import row_box, split_evenly


class GatedFeedForward(nn.Module):
    """hidden [s, B, H] -> down(activation(gate(x)) * up(x)) [s, B, H], gate and up in one product (Shazeer 2020).

    `prefix` begins the global names of its matrices, `ffn` is the inner width; `activation` takes gate and up
    [S, B, 2 f] to their gated product [S, B, f], by default with SiLU.
    """

    def __init__(
        self, build: Build, prefix: str, ffn: int, activation: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        hidden, mesh = build.model.hidden_size, build.mesh
        start, length = split_evenly(ffn, mesh.tp, mesh.index("tp"))
        boxes = tuple(
            row_box(f"{prefix}.{name}.weight", (ffn, hidden), start, length, row, (mesh.rank,))
            for name, row in (("gate_proj", 0), ("up_proj", length))
        )
        self.activation = activation or FusedPrologue(build.kernels.swiglu, _again(build.kernels))
        self.gate_up = build.column(boxes)
        self.down = build.row(f"{prefix}.down_proj.weight", (hidden, ffn), (start, length))

    def forward(self, x_sBH: Tensor, *, recompute: bool = False) -> Tensor:
        gate_up_SBf = self.gate_up(x_sBH)
        if recompute:
            return self.down(gate_up_SBf, prologue=self.activation)
        return self.down(self.activation(gate_up_SBf))


def _again(kernels: Kernels) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    """SwiGLU for the backward pass of a layer that did not keep it, as `FusedPrologue` takes it."""

    def again(grad_SBf: Tensor, gate_up_SBf: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y_SBf, grad_gate_up_SBf = kernels.swiglu_again(grad_SBf, gate_up_SBf)
        return y_SBf, (grad_gate_up_SBf,)

    return again


class SwiGLU(GatedFeedForward):
    """The dense layer of the Llama family."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, f"model.layers.{layer}.mlp", build.model.ffn_hidden_size)


class GeGLU(GatedFeedForward):
    """The dense layer of Gemma: its gate goes through GELU's tanh form."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, f"model.layers.{layer}.mlp", build.model.ffn_hidden_size, build.kernels.geglu)
