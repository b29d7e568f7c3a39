"""The loop of tokens as a graph, on a tape: the tokens of the ordinary loop, and the rules that a graph depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megalite.checkpoint.huggingface.names import HuggingFaceSource
from megalite.checkpoint.source import load_weights
from megalite.cuda_graph import GraphRecorder
from megalite.errors import UserError
from megalite.generation import token_graph
from megalite.generation.cache import Memory
from megalite.generation.generator import Completion, Drawing, Generator, Limits
from megalite.generation.row_group import RowGroup
from megalite.generation.sampling import Sampling
from megalite.generation.token_graph import TokenGraph
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.decoder import Stage
from tests.fixtures import golden
from tests.parallel.test_meta_step import build as meta_trainer
from tests.support.parity import Layout
from tests.support.pool import Pool
from tests.support.recording import HostWait, Recorder, Start, Wait, watching_the_host
from tests.support.tape import TapeRecorder, storages

MODELS = ("llama3_gqa", "llama_tied_mha", "mistral_swa", "qwen3_qknorm", "gemma2_softcaps", "gemma3_two_bases")
"""Grouped and single heads, windows, norms of queries and keys, soft caps, two rotary tables."""
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "whole": Sampling(temperature=0.9, seed=3),
    "top-k and top-p": Sampling(temperature=1.3, top_k=7, top_p=0.8, seed=5),
}


def stage_of(name: str, rank: int = 0, tp: int = 1) -> tuple[Stage, Mesh]:
    """With plain kernels, whose every operation a tape sees."""
    mesh = Mesh(tp=tp, rank=rank)
    with HuggingFaceSource(golden.folder(name)) as source:
        stage = Stage(source.model, mesh, select_kernels({"default": "reference"}, golden.CPU))
        load_weights([stage], source)
    return stage, mesh


def generator_of(stage: Stage, mesh: Mesh, graph: GraphRecorder | None = None) -> Generator:
    generator = Generator({0: stage}, (0,), mesh, stage.build.model, graph=graph)
    generator.look_every = 8  # as on a GPU
    return generator


def ragged(name: str, lengths: tuple[int, ...]) -> list[list[int]]:
    ids = golden.golden(name)["input_ids"].flatten()
    return [ids[7 * row : 7 * row + length].tolist() for row, length in enumerate(lengths)]


def agree(got: list[Completion], expected: list[Completion]) -> None:
    assert [row.new_ids for row in got] == [row.new_ids for row in expected]
    assert [row.reason for row in got] == [row.reason for row in expected]
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(theirs.logprobs), atol=1e-5, rtol=0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cache has not written is NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))


@pytest.mark.fast
@pytest.mark.parametrize("name", MODELS)
def test_replayed_tokens_are_the_tokens(poisoned: None, name: str) -> None:
    """Padded rows that end at different times, by length and by token; several runs share buffers and graphs."""
    stage, mesh = stage_of(name)
    recorder = TapeRecorder()
    graphed, usual = generator_of(stage, mesh, recorder), generator_of(stage, mesh)
    for sampling in SAMPLINGS.values():
        for lengths, seed_rows in (((11, 1, 20, 5, 8), range(5)), ((3, 9), (7, 6)), ((4,), (9,))):
            prompts = ragged(name, lengths)
            limits = [Limits(new, frozenset(range(0, 40, 3))) for new in (14, 3, 9, 12, 14)[: len(prompts)]]
            limits[0] = Limits(14)
            for sampler_logprobs in (False, True) if len(prompts) == 2 else (False,):
                options: dict[str, Any] = {"rows": seed_rows, "sampler_logprobs": sampler_logprobs}
                got, expected = (each.run(prompts, sampling, limits, **options) for each in (graphed, usual))
                agree(got, expected)
                assert len({len(row.new_ids) for row in got}) > 1 or len(got) == 1
    owned = storages([*stage.parameters(), *stage.buffers(), list(vars(graphed._tokens._buffers).values())])
    owned |= storages(list(graphed._tokens._layers.buffers.values()))
    for tape in recorder.tapes:
        strange = {name for storage, name in tape.foreign.items() if storage not in owned}
        assert not strange, f"a recorded token reads tensors that may be gone: {strange}"


@pytest.mark.fast
def test_a_graph_of_each_power_of_two_serves_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded once for 5, 4, 2 and 1 rows; a run that needs more room, another way to draw, or weights that have
    moved begin anew, and nothing of before is kept."""
    monkeypatch.setattr(token_graph, "CAPACITY_STEP", 32)
    stage, mesh = stage_of("llama3_gqa")
    recorder = TapeRecorder()
    generator = generator_of(stage, mesh, recorder)
    prompts = ragged("llama3_gqa", (6, 4, 5, 5, 3))
    limits = [Limits(new) for new in (12, 10, 8, 7, 4)]

    def recorded(prompts: list[list[int]], seed: int = 0, temperature: float = 1.0, more: int = 0) -> int:
        before = len(recorder.tapes)
        own = [Limits(each.max_new_tokens + more) for each in limits[: len(prompts)]]
        generator.run(prompts, Sampling(temperature, seed=seed), own)
        return len(recorder.tapes) - before

    assert recorded(prompts) == 4 and recorder.warmed == 4
    assert recorder.replays == 11  # tokens after the first, each a replay
    assert [recorded(prompts, seed=1), recorded(prompts[:3]), recorded(prompts[:1])] == [0, 0, 0]
    assert recorded(prompts, temperature=0.5) == 4
    assert recorded(prompts, temperature=0.5) == 0
    stage.norm.weight.data = stage.norm.weight.data.clone()
    assert recorded(prompts, temperature=0.5) == 4
    tokens = generator._tokens
    held = [buffer for buffers in tokens._layers.buffers.values() for buffer in buffers]
    assert {buffer.shape[:2] for buffer in held} == {(32, 5)}
    assert recorded(prompts[:1], temperature=0.5, more=20) == 1
    held = [buffer for buffers in tokens._layers.buffers.values() for buffer in buffers]
    assert {buffer.shape[:2] for buffer in held} == {(64, 1)} and len(tokens._graphs) == 1


@pytest.mark.fast
def test_more_tokens_than_random_numbers_at_once() -> None:
    """Numbers are brought 64 at a time; places computed in vain go beyond the model's positions."""
    stage, mesh = stage_of("llama3_gqa")
    most = stage.build.model.max_positions
    prompts, limits = ragged("llama3_gqa", (most - 4, 2, 2, 2, 2)), [Limits(new) for new in (4, 4, 70, 70, 70)]
    graphed, usual = generator_of(stage, mesh, TapeRecorder()), generator_of(stage, mesh)
    agree(*(each.run(prompts, Sampling(seed=2), limits) for each in (graphed, usual)))


@pytest.mark.fast
def test_listeners_and_interrupts_are_served_after_every_token() -> None:
    stage, mesh = stage_of("llama3_gqa")
    asked: list[int] = []

    def interrupt() -> bool:
        asked.append(1)
        return len(asked) == 5

    (row,) = generator_of(stage, mesh, TapeRecorder()).run(
        ragged("llama3_gqa", (5,)), SAMPLINGS["greedy"], Limits(20), interrupt=interrupt
    )
    assert (row.reason, len(row.new_ids)) == ("interrupted", 5)


@pytest.mark.fast
def test_a_run_that_failed_leaves_nothing_behind() -> None:
    """Before its buffers were made, and between two tokens."""
    stage, mesh = stage_of("llama3_gqa")
    graphed, usual = generator_of(stage, mesh, TapeRecorder()), generator_of(stage, mesh)
    prompts, sampling = ragged("llama3_gqa", (6, 4, 5)), SAMPLINGS["whole"]

    def fail(*_: Any) -> None:
        raise MemoryError

    failing = stage.layers[1].attention.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        graphed.run(prompts, sampling, Limits(5))
    failing.remove()
    for part in (prompts[:2], prompts):
        answers = iter([False] * 4)
        with pytest.raises(StopIteration):
            graphed.run(part, sampling, Limits(9), interrupt=lambda answers=answers: next(answers))
        agree(*(each.run(part, sampling, Limits(9)) for each in (graphed, usual)))


def _on_two_ranks(rank: int, name: str) -> list[Any]:
    stage, mesh = stage_of(name, rank, tp=2)
    recorder = TapeRecorder()
    graphed, usual = generator_of(stage, mesh, recorder), generator_of(stage, mesh)
    prompts, limits = ragged(name, (11, 1, 7)), [Limits(new) for new in (9, 4, 6)]
    for sampling in SAMPLINGS.values():
        agree(*(each.run(prompts, sampling, limits) for each in (graphed, usual)))
    return [recorder.replays, len(recorder.tapes)]


def test_tensor_ranks(pool: Pool) -> None:
    """Sums, the gathered logits and the broadcast of what was drawn are part of the graph."""
    assert pool.run(_on_two_ranks, 2, "llama3_gqa") == [[24, 9]] * 2


_ENDS = {2: {0}, 3: {4, 1}, 5: {2, 3}}
"""By token, the rows that end with it."""


class _Watch:
    """A recorder that runs every step under the eyes of `tests.support.recording`, and replays nothing."""

    def __init__(self, groups: Any) -> None:
        self.groups = groups
        self.steps: list[list[Any]] = []

    def warm_up(self, run: Callable[[], Any]) -> Any:
        return run()

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.groups.events = []
        with watching_the_host(self.groups):
            outputs = run()
        self.steps.append(list(self.groups.events))
        return outputs, lambda: None


@pytest.mark.fast
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(tensor=4)], ids=str)
def test_a_recorded_token_never_waits_for_the_device(layout: Layout, sampling: Sampling) -> None:
    """On the meta device, first and other tensor ranks; communications are waited for, and the same every time."""
    for rank in range(min(layout.tensor, 2)):
        trainer, groups = meta_trainer(layout, rank, {"model.sliding_window": 9, "adapter.kind": "lora"})
        watch, stage = _Watch(groups), trainer.stages[0].whole_sequences()
        graph = TokenGraph(stage, trainer.mesh, watch)
        prompts = {0: [1] * 9, 1: [2] * 4, 2: [3], 3: [4], 4: [5]}
        group = RowGroup(prompts, range(5), 6, stage.context, None, graph.cache(5, 15))

        def told(drawn_2B: torch.Tensor, group: RowGroup = group) -> None:
            assert drawn_2B.shape == (2, group.size)
            group.drop(_ENDS.get(group.drawn, ()))

        with torch.no_grad():
            graph.run(group, 0, Drawing(sampling, True, None), told)
        assert len(watch.steps) == 3  # 5, 4 and 2 rows
        names = []
        for events in watch.steps:
            assert not any(isinstance(event, HostWait) for event in events), events
            waited = [event.start for event in events if isinstance(event, Wait)]
            started = [event for event in events if isinstance(event, Start)]
            assert set(map(id, waited)) == set(map(id, started)) and bool(started) == (layout.tensor > 1)
            names.append([event.name for event in started])
        assert names == [names[0]] * 3


@pytest.mark.fast
def test_what_a_graph_cannot_do_is_refused() -> None:
    stage, mesh = stage_of("llama3_gqa")
    refusing, prompt = generator_of(stage, mesh, TapeRecorder()), [[1, 2, 3]]
    with pytest.raises(UserError, match=r"top-p = 0.9 alone sorts.*give top-k as well"):
        refusing.run(prompt, Sampling(top_p=0.9), Limits(2))
    refusing.run(prompt, Sampling(temperature=0, top_p=0.9), Limits(2))
    with pytest.raises(ValueError, match="a graph has a cache of its own"):
        refusing.run(prompt, Sampling(), Limits(2), memory=Memory())
    model, recorder = stage.build.model, Recorder()
    for changed, what in (({"attention": "mla"}, "model.attention = mla"), ({"experts": 8}, "model.experts = 8")):
        with pytest.raises(ValueError, match=what):
            Generator({0: stage}, (0,), mesh, dataclasses.replace(model, **changed), graph=TapeRecorder())
    for axis, what in (("pp", "parallel.pipeline = 2"), ("cp", "parallel.context = 2")):
        with pytest.raises(ValueError, match=what):
            split = Mesh(rank=0, device=recorder.device, make_group=recorder, **{axis: 2})
            Generator({0: stage}, range(split.pp), split, model, graph=TapeRecorder())
    with pytest.raises(ValueError, match=r"parallel\.virtual_stages = 2"):
        Generator({0: stage, 1: stage}, (0, 0), mesh, model, graph=TapeRecorder())
