"""The engine that runs every pipeline schedule: it executes a rank's list of lowered operations.

It knows neither the model nor the loss: a stage's forward pass is a function passed in. The last stage outputs the loss
of a micro-batch (fp64 scalar, gradient 1); in forward-only runs it may output any tensor.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalite.mesh import Mesh, Work
from megalite.parallel.turns import Turns
from megalite.parallel.zero import StageBuckets
from megalite.schedule.ops import Op

StageForward = Callable[[int, int, Tensor | None], Tensor]
"""(stage, micro-batch, input hidden or None on the first stage) -> output hidden, or the loss on the last stage."""

Observer = Callable[[Op], AbstractContextManager[None]]
"""Wraps the execution of every operation, to time it or to name it in a profile."""

_PENDING_SENDS = 2
"""How many tensors may be on their way to neighbours before the oldest is waited for. Lowered plans would run to their
end even if every send waited at once (see `megalite.schedule.lowering`); a few in flight overlap with computation."""


def unobserved(op: Op) -> AbstractContextManager[None]:
    """The observer that does nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Activation:
    """Shape and dtype of the activations sent between stages: hidden [s, B, H], the same for every micro-batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class PipelineEngine:
    """Runs this rank's operations of one step; built once for a plan, used every step.

    `owners[stage]` is the pipeline rank that holds the stage. An output is freed as soon as it has been sent and a
    few others have followed: backward needs only the edge of the graph that it left behind. With `turns`, two forwards
    in a row run at once; what is observed of the first is then both.
    """

    def __init__(
        self,
        ops: tuple[Op, ...],
        owners: Sequence[int],
        mesh: Mesh,
        activation: Activation,
        turns: Turns | None = None,
    ) -> None:
        self.ops, self.owners, self.mesh, self.activation = ops, owners, mesh, activation
        self.last_stage = len(owners) - 1
        self._group = mesh.group("pp")
        self._inputs: dict[tuple[int, int], tuple[Tensor, Work | None]] = {}
        self._gradients: dict[tuple[int, int], tuple[Tensor, Work | None]] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._edges: dict[tuple[int, int], tuple[Tensor | None, GradientEdge | None]] = {}
        self._slopes: dict[tuple[int, int], list[Tensor]] = {}
        self._sending: deque[tuple[Tensor, Work]] = deque()
        self._turns = turns
        self._beside = _neighbours(ops) if turns is not None else {}
        self._second = frozenset(self._beside.values())

    def run(
        self,
        forward: StageForward,
        buckets: Mapping[int, StageBuckets] | None = None,
        observe: Observer = unobserved,
    ) -> dict[int, Tensor]:
        """One step: all forwards and backwards, gradients reduced. Returns the last stage's losses by micro-batch.

        `buckets` are those of this rank's stages; a plan without backward operations needs none.
        """
        losses: dict[int, Tensor] = {}
        for op in self.ops:
            with observe(op):
                if op.kind == "F":
                    self._forward_or_two(op, forward, losses)
                elif op.kind == "B":
                    self._backward(op)
                elif op.kind == "I":
                    assert buckets is not None
                    with buckets[op.stage].delaying(op.micro):
                        self._backward(op)
                elif op.kind == "W":
                    assert buckets is not None
                    buckets[op.stage].run_delayed(op.micro)
                elif op.kind in ("SF", "SB", "RF", "RB"):
                    self._communicate(op)
                elif buckets is not None:
                    self._reduce(op, buckets)
        self._finish_sends(0)
        if buckets is not None:
            for stage in buckets.values():  # not at R, after which other stages of this rank may still compute
                stage.wait()
        return losses

    def _reduce(self, op: Op, buckets: Mapping[int, StageBuckets]) -> None:
        if op.kind == "T":
            buckets[op.stage].sum_tied()
        else:
            buckets[op.stage].finish()

    def _forward_or_two(self, op: Op, forward: StageForward, losses: dict[int, Tensor]) -> None:
        """A forward pass, with the one that takes turns with it; nothing is left to do when that one comes up."""
        if self._turns is not None and op in self._beside:
            one, other = (functools.partial(self._forward, each, forward, losses) for each in (op, self._beside[op]))
            self._turns.run(one, other)
        elif op not in self._second:
            self._forward(op, forward, losses)

    def _forward(self, op: Op, forward: StageForward, losses: dict[int, Tensor]) -> None:
        key = (op.stage, op.micro)
        hidden = None
        if op.stage > 0:
            hidden, work = self._inputs.pop(key)
            if work is not None:
                work.wait()
            hidden.requires_grad_(torch.is_grad_enabled())
        output = forward(op.stage, op.micro, hidden)
        if output.requires_grad:
            seed = output
            if op.stage < self.last_stage:
                seed = _Seed.apply(output, self._slopes.setdefault(key, []))
            self._edges[key] = (hidden, get_gradient_edge(seed))
        if op.stage == self.last_stage:
            losses[op.micro] = output.detach()
        elif self.owners[op.stage + 1] == self.mesh.index("pp"):
            self._inputs[op.stage + 1, op.micro] = (output.detach(), None)
        else:
            self._outputs[key] = output.detach().contiguous()

    def _backward(self, op: Op) -> None:
        key = (op.stage, op.micro)
        hidden, edge = self._edges.pop(key, (None, None))
        if op.stage < self.last_stage:
            gradient, work = self._gradients.pop(key)
            if work is not None:
                work.wait()
            self._slopes.pop(key, []).append(gradient)
            del gradient
        if edge is not None:  # the first stage has none where nothing in it is trained
            torch.autograd.backward(edge)
        if hidden is None:
            return
        slope, hidden.grad = hidden.grad, None  # a postponed product may keep the input, which must not keep this
        assert slope is not None
        if self.owners[op.stage - 1] == self.mesh.index("pp"):
            self._gradients[op.stage - 1, op.micro] = (slope, None)
        else:
            self._outputs[key] = slope.contiguous()

    def _communicate(self, op: Op) -> None:
        key = (op.stage, op.micro)
        neighbour = self.owners[op.stage + (1 if op.kind in ("SF", "RB") else -1)]
        if op.kind in ("RF", "RB"):
            buffer = self.activation.empty()
            arriving = self._inputs if op.kind == "RF" else self._gradients
            arriving[key] = (buffer, self._group.receive(buffer, neighbour))
            return
        tensor = self._outputs.pop(key)
        if tensor.shape != self.activation.shape or tensor.dtype != self.activation.dtype:
            raise ValueError(f"{op}: {tensor.dtype} {tuple(tensor.shape)} does not match {self.activation}")
        self._sending.append((tensor, self._group.send(tensor, neighbour)))
        self._finish_sends(_PENDING_SENDS)

    def _finish_sends(self, most: int) -> None:
        """Wait for sends, the oldest first, until at most so many are under way; their tensors are dropped."""
        while len(self._sending) > most:
            self._sending.popleft()[1].wait()


class _Seed(Function):
    """A scalar in place of a stage's output, whose gradient is what will have been put into `slope` by backward.

    Given a gradient that is not a scalar's, torch would load its symbolic mathematics to check the shape: a second of
    every rank's start.
    """

    spmd = "local"

    @staticmethod
    def forward(ctx: Any, output: Tensor, slope: list[Tensor]) -> Tensor:
        ctx.slope = slope
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.slope.pop(), None


def _neighbours(ops: Sequence[Op]) -> dict[Op, Op]:
    """Forwards of one stage in a row, two by two."""
    beside: dict[Op, Op] = {}
    for op, after in itertools.pairwise(ops):
        if op.kind == after.kind == "F" and op.stage == after.stage and op not in beside.values():
            beside[op] = after
    return beside
