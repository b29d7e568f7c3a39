"""Draw a pipeline schedule: how its operations lie in time, how long the ranks are idle, what they hold.

python tools/draw_schedule.py --schedule 1f1b --ranks 4 --micro-batches 8 --output schedule.png
python tools/draw_schedule.py --schedule interleaved --ranks 4 --micro-batches 8 --virtual-stages 2 --text
"""

import argparse
from pathlib import Path

from megalite.errors import UserError, exit_on_user_error
from megalite.schedule.draw import as_text, draw, headline
from megalite.schedule.lowering import lower
from megalite.schedule.ops import format_plan
from megalite.schedule.schedules import SCHEDULES, build_schedule, find_schedule
from megalite.schedule.simulate import UNIT_COST, check_deadlock, simulate


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw a pipeline schedule as an image or as text.")
    summaries = "; ".join(f"{name}: {schedule.summary}" for name, schedule in SCHEDULES.items())
    parser.add_argument("--schedule", default="1f1b", help=summaries)
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks (default 4)")
    parser.add_argument("--micro-batches", type=int, default=8, help="micro-batches in a step (default 8)")
    parser.add_argument("--virtual-stages", type=int, help="stages on each rank (default: what the schedule needs)")
    parser.add_argument("--backward-cost", type=float, default=2.0, help="whole backward, forward = 1; recompute: 3")
    parser.add_argument("--transfer", type=float, default=0.0, help="time an activation travels, forward = 1")
    parser.add_argument("--output", type=Path, help="image to write: .png, .svg or .pdf")
    parser.add_argument("--text", action="store_true", help="print the timeline")
    parser.add_argument("--operations", action="store_true", help="print each rank's operations, transfers included")
    parser.add_argument("--tied", action="store_true", help="with --operations: tied embeddings, so the sum T is there")
    arguments = parser.parse_args()
    if arguments.backward_cost <= 0:
        parser.error(f"--backward-cost {arguments.backward_cost}: must be above 0")
    if arguments.transfer < 0:
        parser.error(f"--transfer {arguments.transfer}: must be 0 or more")
    return arguments


@exit_on_user_error
def main() -> None:
    arguments = parse_arguments()
    if not (arguments.output or arguments.text or arguments.operations):
        raise UserError("nothing to do: give --output IMAGE, --text or --operations")
    backward = arguments.backward_cost
    chunks = arguments.virtual_stages or find_schedule(arguments.schedule).least_chunks
    plan = build_schedule(arguments.schedule, arguments.ranks, arguments.micro_batches, chunks)
    lowered = lower(plan, tied=arguments.tied)
    check_deadlock(lowered)
    simulation = simulate(plan, {**UNIT_COST, "B": backward, "I": backward / 2, "W": backward / 2}, arguments.transfer)
    title = headline(arguments.schedule, simulation, arguments.micro_batches)
    print(title)
    if arguments.text:
        print(as_text(simulation), end="")
    if arguments.operations:
        print(format_plan(lowered), end="")
    if arguments.output:
        draw(simulation, arguments.output, title)
        print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
