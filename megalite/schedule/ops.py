"""The vocabulary of a pipeline plan: operations, their text form, and what each of them needs before it can run.

Compute operations (what a schedule is made of):
    F  forward                     I  backward, gradient of the input only
    B  backward, whole             W  backward, gradient of the weights only (after I; used by zero-bubble schedules)
Communication (added by `lowering`); `stage` is always the stage of the rank that lists the operation:
    SF RF  send / receive a forward activation: 2SF0 on one rank meets 3RF0 on the other
    SB RB  send / receive a gradient backwards:  3SB0 on one rank meets 2RB0 on the other
    T      sum the gradients of the tied embedding between the first and the last stage (no micro-batch: 0T)
    R      data-parallel reduction of a stage's gradient buckets (no micro-batch: 2R)
Generation (`megalite.generation.flow`) has no gradients, and uses T for something else: all ranks are told the next
tokens of a group, whose number stands for the micro-batch (3T0). Such lists are neither read from text nor simulated.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

COMPUTE = frozenset({"F", "B", "I", "W"})
SENDS = frozenset({"SF", "SB"})
RECEIVES = frozenset({"RF", "RB"})
COLLECTIVES = frozenset({"T", "R"})
NO_MICRO = -1

# PyTorch's spelling of the same operations in the plans that it writes and reads as CSV.
_TORCH_KINDS = {"SEND_F": "SF", "RECV_F": "RF", "SEND_B": "SB", "RECV_B": "RB", "REDUCE_GRAD": "R"}
_KINDS = COMPUTE | SENDS | RECEIVES | COLLECTIVES
_OP_TEXT = re.compile(r"(\d+)([A-Z_]+?)(\d*)")


class ScheduleError(ValueError):
    """A plan that is not a pipeline schedule: the message names the ranks and operations at fault."""


class Op(NamedTuple):
    """One operation of one rank: what (`kind`), on which global stage, for which micro-batch (-1 for T and R)."""

    kind: str
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro}" if self.micro != NO_MICRO else f"{self.stage}{self.kind}"

    def __repr__(self) -> str:
        return str(self)


Plan = tuple[tuple[Op, ...], ...]
"""The operations of every pipeline rank, in execution order, without time slots."""


class Value(NamedTuple):
    """A compute operation's output for other stages: the activation (`"F"`) or input gradient (`"G"`) of a stage."""

    kind: str
    stage: int
    micro: int


def parse_op(text: str) -> Op:
    """Read `2F0`, `3SF1`, `0T`; PyTorch's `3SEND_F1`, `2REDUCE_GRAD` are understood too. Raises ScheduleError."""
    match = _OP_TEXT.fullmatch(text.strip())
    kind = _TORCH_KINDS.get(match[2], match[2]) if match else ""
    if match is None or kind not in _KINDS or (kind in COLLECTIVES) == bool(match[3]):
        raise ScheduleError(f"{text.strip()!r} is not an operation: write stage, kind and micro-batch as in 2F0 or 0T")
    return Op(kind, int(match[1]), int(match[3]) if match[3] else NO_MICRO)


def parse_plan(text: str) -> Plan:
    """Read a plan from text: one line per rank, operations separated by commas; empty fields (PyTorch's idle slots) are
    skipped."""
    return tuple(tuple(parse_op(field) for field in line.split(",") if field.strip()) for line in text.splitlines())


def format_plan(plan: Plan) -> str:
    """Write a plan as `parse_plan` reads it. A plan with only compute operations is also valid PyTorch CSV."""
    return "".join(",".join(map(str, ops)) + "\n" for ops in plan)


def compute_ops(plan: Plan) -> Plan:
    """The plan without its communication."""
    return tuple(tuple(op for op in ops if op.kind in COMPUTE) for ops in plan)


def stage_owners(plan: Plan) -> tuple[int, ...]:
    """The rank that holds each stage. Raises ScheduleError unless each stage is on exactly one rank."""
    owner: dict[int, int] = {}
    for rank, ops in enumerate(plan):
        for stage in {op.stage for op in ops if op.kind in COMPUTE}:
            if owner.setdefault(stage, rank) != rank:
                raise ScheduleError(f"stage {stage} is on rank {owner[stage]} and on rank {rank}: it must be on one")
    if sorted(owner) != list(range(len(owner))) or not owner:
        raise ScheduleError(f"the plan's stages are {sorted(owner)}: they must be 0, 1, 2, ... without a gap")
    return tuple(owner[stage] for stage in range(len(owner)))


def output_of(op: Op) -> Value | None:
    """A compute operation's output; None for W, whose result stays in the gradient buckets."""
    if op.kind == "W":
        return None
    return Value("F" if op.kind == "F" else "G", op.stage, op.micro)


def inputs_of(op: Op, last_stage: int) -> Iterable[Value]:
    """The values a compute operation depends on. The last stage's gradient comes from its own loss."""
    kind, stage, micro = op
    if kind == "F":
        return (Value("F", stage - 1, micro),) if stage else ()
    if kind == "W":
        return (Value("G", stage, micro),)
    own = Value("F", stage, micro)
    return (own,) if stage == last_stage else (own, Value("G", stage + 1, micro))


def counterpart(op: Op, last_stage: int) -> Op:
    """The matching operation of a transfer or a T on the other rank: 3RF0 for 2SF0, 7T for 0T."""
    kind, stage, micro = op
    if kind == "T":
        return Op("T", last_stage - stage, micro)
    step = 1 if kind in ("SF", "RB") else -1
    return Op({"S": "R", "R": "S"}[kind[0]] + kind[1], stage + step, micro)
