"""Groups of rows on their way through the pipeline, token after token, on one rank.

A rank's operations of a token are those of a forward-only schedule, once for each group. The tokens of a group are
known to all ranks after one broadcast, which no rank waits for before it has work for that group again: so the ranks
are busy with the other groups meanwhile, and nothing separates one token from the next.

S positions of one forward pass, B rows of a group, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megalite.generation.row_group import RowGroup
from megalite.mesh import DONE, Mesh, Work
from megalite.model.decoder import Stage
from megalite.schedule.lowering import with_transfers
from megalite.schedule.ops import Op
from megalite.schedule.schedules import forward_only
from megalite.schedule.simulate import completions

Draw = Callable[[RowGroup, Tensor], Tensor]
"""(group, its logits [B, V]) -> what all ranks are told about its next tokens, float64 [2, B]: ids, log-probabilities.
"""

Told = Callable[[int, Tensor], None]
"""(number of a group, what `Draw` gave): the group's tokens, on every rank. Drops rows that have ended."""

_PENDING_SENDS = 2
"""How many tensors may be on their way to the next stage before the oldest is waited for."""


class Flow:
    """Runs groups of rows until none has any left; `draw` is called on one rank, `told` on all of them."""

    def __init__(
        self,
        stages: Mapping[int, Stage],
        owners: Sequence[int],
        mesh: Mesh,
        groups: Sequence[RowGroup],
        draw: Draw,
        told: Told,
    ) -> None:
        self._stages, self._owners, self._mesh, self._groups = stages, owners, mesh, groups
        self._draw, self._told = draw, told
        self._pp, self._everyone = mesh.group("pp"), mesh.group("pp", "cp", "tp")
        drawer = mesh.rank_at(pp=owners[-1], cp=0, tp=0)  # the first context rank has the end of every prompt
        self._drawer, self._draws = self._everyone.ranks.index(drawer), mesh.rank == drawer
        self._ops = token_plan(owners, len(groups))[mesh.index("pp")]
        any_stage = next(iter(stages.values()))
        self._width, self._dtype = any_stage.build.model.hidden_size, any_stage.build.dtype
        self._hidden: dict[tuple[int, int], tuple[Tensor, Work]] = {}
        self._logits: dict[int, Tensor] = {}
        self._drawn: dict[int, tuple[Tensor, Work]] = {}
        self._sending: deque[tuple[Tensor, Work]] = deque()

    def run(self) -> None:
        while any(group.size for group in self._groups):
            for op in self._ops:
                if self._ready(op.micro):
                    self._perform(op)
        self._finish_sends(0)

    def _ready(self, number: int) -> bool:
        """Whether the group has rows left, now that the tokens drawn before, if any, have come."""
        if number in self._drawn:
            drawn_2B, arrived = self._drawn.pop(number)
            arrived.wait()
            self._groups[number].append(drawn_2B[0].long())
            self._told(number, drawn_2B)
        return self._groups[number].size > 0

    def _perform(self, op: Op) -> None:
        group, key = self._groups[op.micro], (op.stage, op.micro)
        if op.kind == "F":
            self._forward(op, group)
        elif op.kind == "RF":
            shape = (group.tokens_BS.shape[1], group.size, self._width)
            hidden_SBH = torch.empty(shape, dtype=self._dtype, device=self._mesh.device)
            self._hidden[key] = hidden_SBH, self._pp.receive(hidden_SBH, self._owners[op.stage - 1])
        elif op.kind == "SF":
            hidden_SBH, _ = self._hidden.pop(key)
            self._sending.append((hidden_SBH, self._pp.send(hidden_SBH, self._owners[op.stage + 1])))
            self._finish_sends(_PENDING_SENDS)
        elif self._draws:
            self._tell(op.micro, self._draw(group, self._logits.pop(op.micro)))
        else:
            self._tell(op.micro, torch.zeros(2, group.size, dtype=torch.float64, device=self._mesh.device))

    def _forward(self, op: Op, group: RowGroup) -> None:
        stage = self._stages[op.stage]
        x, arrived = self._hidden.pop((op.stage, op.micro)) if op.stage > 0 else (group.tokens_BS, DONE)
        arrived.wait()
        hidden_SBH = stage(x, group.positions(stage), group.cache)
        if stage.last:
            logits_BV = stage.logits(hidden_SBH[-1:]).squeeze(0)
            if self._draws:
                self._logits[op.micro] = logits_BV
        elif self._owners[op.stage + 1] == self._mesh.index("pp"):
            self._hidden[op.stage + 1, op.micro] = hidden_SBH, DONE
        else:
            self._hidden[op.stage, op.micro] = hidden_SBH.contiguous(), DONE

    def _tell(self, number: int, drawn_2B: Tensor) -> None:
        self._drawn[number] = drawn_2B, self._everyone.broadcast(drawn_2B, self._drawer)

    def _finish_sends(self, most: int) -> None:
        while len(self._sending) > most:
            self._sending.popleft()[1].wait()


def token_plan(owners: Sequence[int], groups: int) -> tuple[tuple[Op, ...], ...]:
    """Each rank's operations for one token of every group: F, the transfers SF and RF, and T where it is told.

    As in `megalite.schedule.lowering`, all ranks' lists are projections of one total order, so that nothing hangs even
    if transfers and broadcasts share a queue. That holds for tokens one after the other, and where groups have ended.
    """
    lists: list[list[Op]] = [[] for _ in range(max(owners) + 1)]
    for op, *_ in completions(forward_only(owners, groups)):
        for rank, listed in with_transfers(op, owners):
            lists[rank].append(listed)
        if op.stage == len(owners) - 1:
            for ops in lists:
                ops.append(Op("T", op.stage, op.micro))
    return tuple(map(tuple, lists))
