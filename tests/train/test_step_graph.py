"""Recorded steps: the same bits as unrecorded ones, and the rules that a graph depends on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megalite.cuda_graph import recorder_for
from megalite.data.batch import Batch
from megalite.errors import UserError
from megalite.kernels.cross_entropy import cross_entropy_grad_, cross_entropy_stats
from megalite.placement import placed_parameters
from megalite.train.step_graph import WARM_UP, StepGraph
from tests.parallel.test_meta_step import batches as meta_batches
from tests.parallel.test_meta_step import build as meta_trainer
from tests.support.parity import EVERYTHING, Case, Layout, build_trainer, micro_batches
from tests.support.recording import Wait
from tests.support.tape import CannotBeRecorded, Tape, TapeRecorder, storages

STEPS = WARM_UP + 3
KINDS = {
    "plain": {},
    "bf16": {"train.precision": "bf16"},
    "everything": EVERYTHING,
    "selective": {"train.recompute": "selective", "train.precision": "bf16"},
    "full": {"train.recompute": "full"},
    "sandwich_norm": {"model.block": "sandwich_norm", "model.residual_multiplier": 0.5},
    "adapter": {"adapter.kind": "lora", "adapter.rank": 2},
}


def _stats_and_gradient(logits_NV, labels_N, scale_N, *, valid, z_loss):
    stats_N3 = cross_entropy_stats(logits_NV, labels_N, valid=valid)
    cross_entropy_grad_(logits_NV, labels_N, stats_N3, scale_N, valid=valid, z_loss=z_loss)
    return stats_N3


def trained(fields, documents, recorder=None):
    """(loss and norm of each step, weights and moments at the end, the trainer)."""
    config = Case.of({"kernels.default": "reference"} | fields, documents=documents).config(1)
    trainer = build_trainer(config, 0, 1)
    head = trainer.stages[0].head  # whose plain form asks on CPUs alone whether any token is ignored
    head.kernels = dataclasses.replace(head.kernels, cross_entropy_stats_grad_=_stats_and_gradient)
    if recorder is not None:
        trainer.graph = trainer.make_graph(recorder)
    told = []
    for step in range(STEPS):
        result = trainer.step(micro_batches(4 * step, 4, config, trainer.mesh, documents), 1e-3 * (step + 1))
        assert result.accepted
        told.append((result.loss, result.grad_norm, result.units, result.metrics))
    states = [tensor for segment in trainer.optimizer.segments for _, tensor in sorted(segment.state.items())]
    weights = [parameter.detach() for parameter in placed_parameters(trainer.stages[0])]
    return told, [*weights, *states], trainer


@pytest.mark.parametrize(("kind", "documents"), [*((kind, False) for kind in KINDS), ("everything", True)])
def test_replayed_steps_are_the_steps(kind, documents):
    recorder = TapeRecorder()
    (told, tensors, trainer), (expected, wanted, _) = (
        trained(KINDS[kind], documents, recorder),
        trained(KINDS[kind], documents),
    )
    assert told == expected
    assert all(map(torch.equal, tensors, wanted))
    assert (recorder.warmed, len(recorder.tapes), recorder.replays) == (WARM_UP, 1, STEPS - WARM_UP)
    stage, graph = trainer.stages[0], trainer.graph
    buckets = [bucket for bucket in trainer.buckets[0].buckets if bucket.trained]
    aliases = [alias.main_grad for alias in trainer.buckets[0].aliases]
    owned = storages([*stage.parameters(), *stage.buffers(), *(bucket.gradients for bucket in buckets), aliases])
    owned |= storages([list(vars(batch).values()) for batch in graph._inputs])
    strange = {name for storage, name in recorder.tapes[0].foreign.items() if storage not in owned}
    assert not strange, f"a recorded step reads tensors that may be gone: {strange}"


LAYOUTS = {
    "tensor": (Layout(tensor=2), 1),
    "tensor, sequence": (Layout(tensor=2, sequence=True), 1),
    "zero 0": (Layout(data=2, zero=0), 1),
    "zero 1": (Layout(data=2, zero=1), 0),
    "both": (Layout(tensor=2, sequence=True, data=2, zero=1), 3),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_recorded_step_starts_the_same_communications_and_waits_for_each(name):
    """And before it, everything that the update left on its way is waited for."""
    layout, rank = LAYOUTS[name]
    trainer, groups = meta_trainer(layout, rank, {"model.tie_embeddings": name == "both"})
    tape = TapeRecorder()
    trainer.graph = trainer.make_graph(tape)
    told = []
    for _ in range(WARM_UP + 2):
        settled, groups.events = groups.unwaited(), []
        trainer.accumulate(meta_batches(trainer))
        events, groups.events = groups.events, []
        first = [event.start for event in events[: len(settled)] if isinstance(event, Wait)]
        assert set(map(id, first)) == set(map(id, settled))
        told.append(events[len(settled) :])
        trainer.optimizer.step(1e-3, 1.0)
    recorded, replayed = told[WARM_UP:]
    assert recorded and not replayed and tape.replays == 2
    assert list(map(_name, recorded)) == list(map(_name, told[WARM_UP - 1]))
    waited = [event.start for event in recorded if isinstance(event, Wait)]
    started = [event for event in recorded if not isinstance(event, Wait)]
    assert set(map(id, waited)) == set(map(id, started))


def _name(event):
    return f"{type(event).__name__} {event.start if isinstance(event, Wait) else event}"


def test_another_kind_of_step_is_recorded_anew():
    calls, held, recorder = [], [torch.zeros(1)], TapeRecorder()

    def accumulate(batches, shape):
        calls.append(len(batches))
        return torch.stack([batch.tokens_BS.sum() for batch in batches])

    graph = StepGraph(accumulate, lambda: None, lambda: held, recorder)
    for count, moved in ((2, False), (3, False), (3, True)):
        held = [torch.zeros(1)] if moved else held
        calls.clear()
        for step in range(WARM_UP + 3):
            batches = [Batch(torch.full((1, 2), step + micro), torch.zeros(1, 2)) for micro in range(count)]
            assert graph(batches, None).tolist() == [2 * (step + micro) for micro in range(count)]
        assert calls == [count] * (WARM_UP + 1)
    assert len(recorder.tapes) == 3 and graph.recorded


@pytest.mark.fast
@pytest.mark.parametrize(
    "rule",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.to("meta"),
    ],
)
def test_the_tape_refuses_what_no_graph_holds(rule):
    with pytest.raises(CannotBeRecorded), Tape():
        rule(torch.ones(3))


@pytest.mark.fast
def test_only_a_gpu_records():
    with pytest.raises(UserError, match="--cuda-graph needs a GPU"):
        recorder_for(torch.device("cpu"), "--cuda-graph")
    config = Case.of({"train.cuda_graph": True}).config(1)
    with pytest.raises(UserError, match=r"train.cuda_graph = true needs a GPU.*cpu"):
        build_trainer(config, 0, 1)
