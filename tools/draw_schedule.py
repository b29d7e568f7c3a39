"""Draw a pipeline schedule: how its operations lie in time, how long the ranks are idle, what they hold.

python tools/draw_schedule.py --schedule 1f1b --ranks 4 --micro-batches 8 --output schedule.png
python tools/draw_schedule.py --schedule interleaved --ranks 4 --micro-batches 8 --virtual-stages 2 --text
"""

import argparse

from megalite.cli import Parser, file_path, number, positive, program, whole
from megalite.errors import UserError
from megalite.schedule.draw import as_text, draw, headline
from megalite.schedule.lowering import lower
from megalite.schedule.ops import format_plan
from megalite.schedule.schedules import SCHEDULES, build_schedule, find_schedule
from megalite.schedule.simulate import UNIT_COST, check_deadlock, simulate


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    summaries = "; ".join(f"{name}: {schedule.summary}" for name, schedule in SCHEDULES.items())
    add("--schedule", default="1f1b", help=summaries)
    add("--ranks", type=whole(1, 4096), default=4, metavar="N", help="pipeline ranks (4)")
    add("--micro-batches", type=whole(1, 65536), default=8, metavar="M", help="micro-batches in a step (8)")
    add("--virtual-stages", type=whole(1, 1024), metavar="V", help="stages on each rank (what the schedule needs)")
    add("--backward-cost", type=positive, default=2.0, metavar="C", help="whole backward, forward = 1; recompute: 3")
    add("--transfer", type=number(), default=0.0, metavar="T", help="time an activation travels, forward = 1")
    add("--output", type=file_path, metavar="IMAGE", help="image to write: .png, .svg or .pdf")
    add("--text", action="store_true", help="print the timeline")
    add("--operations", action="store_true", help="print each rank's operations, transfers included")
    add("--tied", action="store_true", help="with --operations: tied embeddings, so the sum T is there")
    options = parser.parse_args()
    if not (options.output or options.text or options.operations):
        raise UserError("nothing to do: give --output IMAGE, --text or --operations")
    return options


@program
def main() -> None:
    arguments = parse()
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
