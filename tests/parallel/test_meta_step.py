"""Whole training steps as a GPU would be given them, without one: on the meta device, with groups that write down.

Every communication gets dense tensors of one dtype on the device, of fitting sizes (`RecordingGroup` asserts it); the
host waits for the device once in a step, where all ranks agree; every communication is waited for.
"""

from __future__ import annotations

import pytest
import torch

from megalite.data.batches import Batch
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.objective.next_token import NEXT_TOKEN
from megalite.train.trainer import Trainer
from tests.parallel.test_seams import FOCAL, REGRESSION
from tests.support.parity import Case, Layout
from tests.support.recording import META, Recorder, Wait, watching_the_host

AGREED = "Trainer._agree"

SMALL = {
    "model.layers": 4,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 128,
    "model.heads": 8,
    "model.kv_heads": 2,
    "model.head_dim": 16,
    "model.vocab_size": 250,
    "model.max_positions": 64,
    "train.seq_length": 32,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 16,
    "train.precision": "bf16",
}


def build(layout, rank=0, fields=None, objective=NEXT_TOKEN, recorder=None):
    """One rank's trainer and what writes it down, on the recorder's device."""
    config = Case.of(SMALL | {"train.global_batch_size": 8 * layout.data} | layout.fields | dict(fields or {})).config(
        layout.world
    )
    recorder = recorder or Recorder()
    mesh = Mesh(
        pp=layout.pipeline,
        dp=layout.data // layout.expert,
        ep=layout.expert,
        cp=layout.context,
        tp=layout.tensor,
        rank=rank,
        device=recorder.device,
        make_group=recorder,
    )
    kernels = select_kernels({"default": "reference", "attention": "sdpa"}, recorder.device)
    trainer = Trainer(config, mesh, kernels, objective=objective)
    trainer.observe = recorder.observe
    return trainer, recorder


def batches(trainer, documents=False):
    if not trainer.needs_batches and not documents:
        return [None] * 4
    columns = 4 if documents else 2
    return [Batch(*(torch.zeros(trainer.shape, dtype=torch.int64, device=META) for _ in range(columns)))] * 4


def step(trainer, recorder, documents=False):
    """The events of one step, the host watched."""
    recorder.events = []
    with watching_the_host(recorder):
        assert trainer.step(batches(trainer, documents), 1e-3).accepted
    return recorder.events


KINDS = {
    "alone": (Layout(), 0, {}),
    "alone, selective": (Layout(), 0, {"train.recompute": "selective"}),
    "alone, full": (Layout(), 0, {"train.recompute": "full"}),
    "alone, fp32": (Layout(), 0, {"train.precision": "fp32"}),
    "alone, tied": (Layout(), 0, {"model.tie_embeddings": True, "train.z_loss": 1e-3}),
    "alone, biases and window": (Layout(), 0, {"model.attention_bias": True, "model.sliding_window": 5}),
    "tensor": (Layout(tensor=2), 1, {}),
    "tensor, sequence": (Layout(tensor=2, sequence=True), 1, {"model.qk_norm": True}),
    "tensor 4, shared heads": (Layout(tensor=4, sequence=True), 3, {"train.recompute": "full", "train.z_loss": 1e-3}),
    "tensor, selective": (Layout(tensor=2, sequence=True), 0, {"train.recompute": "selective"}),
    "uneven heads": (Layout(tensor=3), 1, {"model.heads": 6, "model.kv_heads": 2, "model.ffn_hidden_size": 96}),
    "zero 0": (Layout(data=2, zero=0), 1, {}),
    "zero 1": (Layout(data=2, zero=1), 1, {"train.recompute": "selective"}),
    "zero 2": (Layout(data=2, zero=2), 1, {}),
    "zero 3": (Layout(data=2, zero=3), 1, {}),
    "muon": (Layout(data=2, zero=1), 1, {"optimizer.kind": "muon"}),
    "muon, zero 3": (Layout(pipeline=2, data=2, zero=3), 3, {"optimizer.kind": "muon"}),
    "zero 3, full": (Layout(data=2, zero=3, tensor=2, sequence=True), 3, {"train.recompute": "full"}),
    "gpipe": (Layout(pipeline=2, schedule="gpipe"), 0, {}),
    "1f1b first": (Layout(pipeline=2), 0, {"model.tie_embeddings": True}),
    "1f1b last": (Layout(pipeline=2), 1, {"model.tie_embeddings": True}),
    "1f1b middle": (Layout(pipeline=4, tensor=2, sequence=True), 3, {"model.tie_embeddings": True}),
    "interleaved": (Layout(pipeline=2, schedule="interleaved", data=2, zero=3), 3, {}),
    "zb_h1": (Layout(pipeline=2, schedule="zb_h1", data=2, zero=2), 0, {}),
    "zb_h1, tensor": (Layout(pipeline=2, schedule="zb_h1", tensor=2, sequence=True), 3, {}),
    "zb_v": (Layout(pipeline=2, schedule="zb_v", data=2), 0, {"model.tie_embeddings": True}),
    "all at once": (
        Layout(tensor=2, sequence=True, pipeline=2, data=2),
        5,
        {"model.tie_embeddings": True, "model.qk_norm": True, "train.recompute": "selective"},
    ),
}
OBJECTIVES = {"log-probabilities": FOCAL, "values": REGRESSION}


def check(trainer, recorder, documents=False):
    """Two steps: in the second, gradients are reduced under backward."""
    for _ in range(2):
        events = step(trainer, recorder, documents)
        assert [event.function for event in recorder.host_waits()] == [AGREED]
        waits = [event.start for event in events if isinstance(event, Wait)]
        assert len(waits) == len(set(waits))
        assert all(start.name == "all_gather" for start in recorder.unwaited()), recorder.unwaited()


@pytest.mark.parametrize("name", KINDS)
def test_a_step_asks_the_host_once_and_speaks_as_nccl_wants_it(name):
    layout, rank, fields = KINDS[name]
    check(*build(layout, rank, fields))


@pytest.mark.parametrize("name", ["alone", "tensor, sequence", "1f1b middle", "interleaved"])
def test_the_same_of_documents(name):
    layout, rank, fields = KINDS[name]
    trainer, recorder = build(layout, rank, fields | {"data.document_mask": True})
    check(trainer, recorder, documents=True)


@pytest.mark.parametrize("reads", OBJECTIVES)
@pytest.mark.parametrize("name", ["alone", "tensor, sequence", "zero 3", "1f1b last"])
def test_the_same_of_other_objectives(name, reads):
    layout, rank, fields = KINDS[name]
    check(*build(layout, rank, fields, OBJECTIVES[reads]))


@pytest.mark.fast
@pytest.mark.parametrize("name", ["tensor, sequence", "zero 3", "all at once"])
def test_validation_asks_the_host_once(name):
    layout, rank, fields = KINDS[name]
    trainer, recorder = build(layout, rank, fields)
    with watching_the_host(recorder):
        trainer.evaluate(batches(trainer))
    assert [event.function for event in recorder.host_waits()] == [AGREED]


@pytest.mark.fast
def test_the_watch_sees_what_stops_the_host():
    recorder, x = Recorder(), torch.ones(3, device=META)
    stops = {
        "item": lambda: x.sum().item(),
        "tolist": lambda: x.tolist(),
        "bool": lambda: bool(x.sum() > 0),
        "cpu": lambda: x.cpu(),
        "to the device": lambda: torch.ones(3).to(META),
        "a list": lambda: torch.tensor([1.0, 2.0], device=META),
        "mask": lambda: x[x > 0],
        "nonzero": lambda: x.nonzero(),
    }
    for name, stop in stops.items():
        recorder.events = []
        with watching_the_host(recorder):
            try:
                stop()
            except (RuntimeError, NotImplementedError):
                assert name in ("mask", "nonzero")  # the meta device knows no such shapes
        assert recorder.host_waits(), name
    recorder.events = []
    with watching_the_host(recorder):
        x[1:] = 0
        torch.where(x > 0, x, 2.0).masked_fill_(x > 1, 3.0)[torch.zeros(2, dtype=torch.int64, device=META)] += 1
        torch.ones(3).to(META, non_blocking=True)
    assert not recorder.events
