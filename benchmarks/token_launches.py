"""What the host launches for one token in generation, counted on the meta device without a GPU.

    python benchmarks/token_launches.py --output benchmarks/results/token_launches.json

Layers of Llama 3 8B, 16 rows, bf16, counted as in `launches.py`: a layer's share is the difference between two layers
and one; the rest is embedding, output layer, drawing at temperature 1, and the counters. `loop` is the ordinary loop,
`graph` what one replay holds, which is one call of the host (`megalite.generation.token_graph`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from launches import Launches
from one_layer import LLAMA_8B, on_a_hopper, trainer_of
from provenance import commit
from torch import Tensor

from megalite.cli import program
from megalite.files import write_atomically
from megalite.generation.flow import Flow
from megalite.generation.generator import Drawing
from megalite.generation.row_group import RowGroup
from megalite.generation.sampling import Sampling
from megalite.generation.token_graph import TokenGraph
from megalite.kernels.attention import decode_triton

ROWS, PROMPT, POSITIONS = 16, 8, 64
LAYERS = 32
PROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True)
class Options:
    """Counts of one token."""

    output: Path | None = None
    """JSON file for the counts; without it they are only printed."""


class Counted:
    """A graph recorder that counts what a recorded token launches, and replays nothing."""

    def __init__(self, launches: Launches) -> None:
        self.launches, self.calls = launches, Counter[str]()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        return run()

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        before = self.launches.calls.copy()
        outputs = run()
        self.calls = self.launches.calls - before
        return outputs, lambda: None


def token(layers: int, graph: bool) -> Counter[str]:
    """Launches of the third token of each row, by kernel."""
    trainer, launches, tokens = trainer_of(layers, POSITIONS, "none"), Launches(), list[Counter[str]]()
    stage, draw, recorder = trainer.stages[0], Drawing(Sampling(1.0), True, None), Counted(launches)
    loop = TokenGraph(stage, trainer.mesh, recorder) if graph else None
    cache = None if loop is None else loop.cache(ROWS, POSITIONS)
    prompts = {row: [1] * PROMPT for row in range(ROWS)}
    group = RowGroup(prompts, range(ROWS), POSITIONS - PROMPT, stage.context, None, cache)

    def told(*_: Any) -> None:
        tokens.append(launches.calls.copy())
        if group.drawn == 3:
            group.drop(prompts)

    def drawn(group: RowGroup, logits_BV: Tensor) -> Tensor:
        return draw(logits_BV, group.uniforms(0))

    room = mock.patch.object(decode_triton, "program_count", lambda device: 2 * PROCESSORS)
    with on_a_hopper(), room, torch.no_grad(), launches, launches.of_triton():
        if loop is None:
            Flow({0: stage}, (0,), trainer.mesh, [group], drawn, told).run()
            return tokens[-1] - tokens[-2]
        loop.run(group, 0, draw, told)
    assert tokens[-1] == tokens[-2], "a replayed token launches something besides"
    return recorder.calls


@program
def main() -> None:
    """Count, print and write."""
    options, counts = tyro.cli(Options, description=__doc__), {}
    for name in ("loop", "graph"):
        one, two = (token(layers, name == "graph") for layers in (1, 2))
        layer, whole = two - one, one.total()
        counts[name] = {
            "layer": layer.total(),
            "rest": whole - layer.total(),
            f"{LAYERS} layers": whole + (LAYERS - 1) * layer.total(),
            "calls of the host": 1 if name == "graph" else whole + (LAYERS - 1) * layer.total(),
            "kernels of a layer": dict(sorted(layer.items())),
        }
        print(f"{name}: {json.dumps(counts[name], indent=1)}")
    if options.output is not None:
        document = {"model": LLAMA_8B, "rows": ROWS, "torch": torch.__version__, "commit": commit(), "now": counts}
        write_atomically(options.output, json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
