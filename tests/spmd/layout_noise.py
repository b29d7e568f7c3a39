"""How far two layouts of one model drift apart: loss, gradient, weights, against one process.

    python -m tests.spmd.layout_noise [--steps 8]

All ranks run in this process, one after the other (`tests/support/virtual.py`). `loss` and `gradient` are those of the
first step, `weights` those after the last; gradients and weights as the largest |a - b| / |b| of any tensor. `noise` is
one process with the samples of each step in another order, or with more of them in a micro-batch, which changes nothing
but the order of sums and the shapes of products. Prints the table of docs/numerics.md.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from megalite.cli import Parser, program, whole
from tests.support import parity
from tests.support.parity import Case, Layout, Outcome, distance, train_alone, train_virtually

MODEL: dict[str, Any] = {
    "model.layers": 4,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 160,
    "model.heads": 8,
    "model.kv_heads": 2,
    "model.head_dim": 8,
    "model.vocab_size": 500,
    "model.max_positions": 64,
    "train.seq_length": 64,
    "train.global_batch_size": 8,
}
EXPERTS: dict[str, Any] = {
    "model.experts": 8,
    "model.experts_per_token": 2,
    "model.expert_ffn_hidden_size": 48,
    "model.aux_loss": 0.01,
}
LAYOUTS = {
    "pipeline 2, any schedule": Layout(pipeline=2, schedule="zb_h1"),
    "data 2, ZeRO-1": Layout(data=2, zero=1),
    "data 4, ZeRO-3": Layout(data=4, zero=3),
    "tensor 2": Layout(tensor=2),
    "tensor 4, sequence parallel": Layout(tensor=4, sequence=True),
    "context 2, gather": Layout(context=2, mode="gather"),
    "context 2, ring": Layout(context=2, mode="ring"),
    "context 2, ulysses": Layout(context=2, mode="ulysses"),
    "tensor 2 x pipeline 2 x data 2": Layout(tensor=2, sequence=True, pipeline=2, data=2, zero=1),
}
OF_EXPERTS = {"experts: expert 2, data 2": Layout(data=2, expert=2), "experts: tensor 2": Layout(tensor=2)}


def differences(one: Outcome, other: Outcome) -> tuple[float, float, float]:
    """(loss of the first step, gradients of the first step, weights after the last), relative."""
    gradients, weights = (
        max(distance(ours[name], theirs[name]) for name in theirs)
        for ours, theirs in ((one.gradients, other.gradients), (one.weights, other.weights))
    )
    return abs(one.losses[0] / other.losses[0] - 1), gradients, weights


def reordered(case: Case) -> Outcome:
    """The same with the samples of every step from last to first."""
    deal = parity.micro_batches
    with mock.patch.object(parity, "micro_batches", lambda *arguments: deal(*arguments)[::-1]):
        return parity.combine([parity.train_rank(0, case, 1, False)], Layout())


def shown(numbers: tuple[float, float, float]) -> str:
    return " | ".join("0" if number == 0 else f"{number:.0e}" for number in numbers)


def parse() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=whole(), default=8, metavar="N", help="optimizer steps (8)")
    steps: int = parser.parse_args().steps
    return steps


@program
def main() -> int:
    steps = parse()
    print("| | fp32: loss | gradient | weights | bf16: loss | gradient | weights |\n|---|---|---|---|---|---|---|")
    cases = {kind: Case.of(MODEL | {"train.precision": kind}, steps=steps) for kind in ("fp32", "bf16")}
    noise = [shown(differences(reordered(case), train_alone(case))) for case in cases.values()]
    print(f"| noise: samples in another order | {' | '.join(noise)} |", flush=True)
    by_two = {"train.micro_batch_size": 2}
    noise = [shown(differences(train_alone(case.having(by_two)), train_alone(case))) for case in cases.values()]
    print(f"| noise: micro-batches of two samples | {' | '.join(noise)} |", flush=True)
    for layouts, fields in ((LAYOUTS, {}), (OF_EXPERTS, EXPERTS)):
        for name, layout in layouts.items():
            cells = []
            for case in cases.values():
                case = case.having(fields)
                cells.append(shown(differences(train_virtually(case, layout), train_alone(case))))
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
