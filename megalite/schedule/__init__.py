"""Pipeline parallelism with the schedule as data.

A schedule is a pure function that returns every rank's list of compute operations (`schedules`); `lowering` adds the
transfers and collectives; `simulate` times a plan and proves that it cannot deadlock; `draw` draws it. All of them, and
the engine that executes a plan, use the same tuples of `ops.Op`; only the engine needs torch.
"""
