"""Pipeline parallelism with the schedule as data.

A schedule is a pure function that gives every rank its list of compute operations (`schedules`); `lowering` adds the
transfers and collectives; `simulate` times a plan and proves that it cannot deadlock; `draw` makes a picture of it.
All of them, and the engine that executes a plan, read the same tuples of `ops.Op`. None of these modules needs torch.
"""

from megalite.parallel.pipeline.lowering import lower
from megalite.parallel.pipeline.ops import Op, Plan, ScheduleError, format_plan, parse_plan
from megalite.parallel.pipeline.schedules import SCHEDULES, build_schedule, forward_only
from megalite.parallel.pipeline.simulate import DeadlockError, Simulation, check_deadlock, simulate

__all__ = [
    "SCHEDULES",
    "DeadlockError",
    "Op",
    "Plan",
    "ScheduleError",
    "Simulation",
    "build_schedule",
    "check_deadlock",
    "format_plan",
    "forward_only",
    "lower",
    "parse_plan",
    "simulate",
]
