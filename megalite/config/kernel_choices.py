"""The section `kernels` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from megalite.config.fields import DERIVED, derive

KernelChoice = Literal["auto", "triton", "reference"]
AttentionChoice = Literal["auto", "triton", "sdpa", "cpu", "reference"]
GroupedChoice = Literal["auto", "triton", "torch", "reference"]


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation computes each operation; the start-up log tells what was taken."""

    default: KernelChoice = "auto"
    """For every operation without its own line. `auto` takes what was measured fastest on the device."""
    attention: AttentionChoice = DERIVED
    """Causal attention; `sdpa` is torch's own, `cpu` a choice among forms for CPUs by a fixed rule."""
    rms_norm: KernelChoice = DERIVED
    """RMSNorm, with the residual sum."""
    rope: KernelChoice = DERIVED
    """Rotary positions of queries and keys."""
    swiglu: KernelChoice = DERIVED
    """silu(gate) * up."""
    grouped: GroupedChoice = DERIVED
    """Products of tokens with the experts they chose; `torch` is torch's own grouped product."""
    cross_entropy: KernelChoice = DERIVED
    """Softmax cross-entropy over the (split) vocabulary."""
    adamw: KernelChoice = DERIVED
    """The optimizer's update."""
    symmetric: KernelChoice = DERIVED
    """Muon's products A A^T; `triton` computes one half of each, and `auto` leaves them to torch."""
    fp8: KernelChoice = DERIVED
    """Casts to 8-bit floats, for `train.fp8`."""
    fp8_blocks: KernelChoice = DERIVED
    """The same with a scale for each block, and their products."""

    def __post_init__(self) -> None:
        derive(self, **{operation.name: self.default for operation in fields(self)})
