"""Planning a run before it starts: parameters, FLOPs, memory, time, cost, and the best layout.

`estimate` makes a `Plan` from a configuration, a number of devices and their kind; `search` ranks the layouts. The
parts can be used alone: `Job` says what is run where, `memory` and `step_time` predict it, `published` holds the
numbers that others have measured, with which the predictions are compared.
"""

from megalite.planning.estimate import Plan, estimate
from megalite.planning.hardware import DEVICES, Device
from megalite.planning.job import Job

__all__ = ["DEVICES", "Device", "Job", "Plan", "estimate"]
