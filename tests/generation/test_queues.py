"""Generation under NCCL's rules: what one rank starts can hang no other, in any placement of the stages.

Every rank runs alone, against groups that write down what it starts and waits for; all rows run to their limits.
"""

from __future__ import annotations

import pytest
import torch

from megalite.generation import generator
from megalite.generation.generator import Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from tests.generation.test_layouts import CPU, Layout, config_of
from tests.support.nccl import play
from tests.support.recording import Recorder, Start, Wait

LAYOUTS = [
    Layout(pipeline=2),
    Layout(pipeline=4),
    Layout(pipeline=2, schedule="interleaved"),
    Layout(pipeline=2, schedule="zb_v"),
    Layout(pipeline=2, tensor=2),
    Layout(pipeline=2, tensor=2, data=2, schedule="interleaved"),
]


def _events(layout: Layout, rank: int, rows: int) -> list[Start | Wait]:
    recorder = Recorder(CPU)
    mesh = Mesh(pp=layout.pipeline, dp=layout.data, tp=layout.tensor, rank=rank, make_group=recorder)
    model = ShardedModel(config_of(layout), mesh, select_kernels({}, CPU), trained=False)
    model.initialise()
    recorder.events.clear()
    with model.generating() as stages:
        prompts = [[1] * (1 + row) for row in range(rows)]
        limits = [Limits(1 + row % 3) for row in range(rows)]
        Generator(stages, model.owners, mesh, model.config.model).run(prompts, Sampling(0), limits)
    assert not recorder.unwaited()
    return [event for event in recorder.events if isinstance(event, (Start, Wait))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_generation_does_not_hang(layout: Layout, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "sample", lambda logits_BV, *_, **__: torch.zeros(2, len(logits_BV)))  # nothing came
    programs = [_events(layout, rank, rows) for rank in range(layout.world)]
    for one_communicator in (False, True):
        play(programs, layout.pipeline - 1, one_communicator=one_communicator)
    broadcasts = [event for event in programs[0] if isinstance(event, Start) and event.name == "broadcast"]
    groups, tokens = min(rows, layout.pipeline), max(1 + row % 3 for row in range(rows))
    assert len(broadcasts) <= groups * tokens
    assert {len(event.ranks) for event in broadcasts} == {layout.pipeline * layout.tensor}
