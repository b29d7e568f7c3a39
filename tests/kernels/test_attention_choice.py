"""`kernels.attention = auto` on a GPU: settled before the first step, by one rank for all, kept, and never fatal."""

import dataclasses
import json
import logging
import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megalite.errors import FINISHED, UserError
from megalite.kernels import select_kernels
from megalite.kernels.attention import Documents, attention_reference
from megalite.kernels.attention.call import Call
from megalite.kernels.attention.choice import (
    Checks,
    MeasuredAttention,
    Within,
    choose_attention,
    sdpa_backends,
    seconds,
)
from megalite.kernels.attention.cpu import attention_cpu
from megalite.kernels.attention.sdpa import attention_sdpa
from megalite.kernels.attention.trial import admitted
from megalite.mesh import Mesh
from megalite.train.__main__ import main
from megalite.train.attention_calls import attention_calls
from megalite.train.trainer import Trainer
from tests.support.parity import Case, Layout, build_trainer, micro_batches
from tests.support.tiny import write_recipe

pytestmark = pytest.mark.fast
CPU = torch.device("cpu")


class Candidates:
    """Fake implementations with given times, or what they raise; counts how often they are measured and called."""

    def __init__(self, **times):
        self.times, self.measured, self.called = times, [], []
        checks = Checks(self._measure, lambda *_: None, admitted)
        self.attention = MeasuredAttention({name: self._function(name) for name in times}, checks)

    def _function(self, name):
        def call(q, k, v, **options):
            self.called.append(name)
            return attention_reference(q, k, v, **options)

        return call

    def _measure(self, candidate, tensors, options):
        candidate(*tensors, **options)
        name = self.called.pop()
        self.measured.append(name)
        if isinstance(self.times[name], Exception):
            raise self.times[name]
        return self.times[name]

    @property
    def kernels(self):
        return dataclasses.replace(select_kernels({}, CPU), attention=self.attention)


def heads(queries=8, keys=8, width=16, dtype=torch.float32, trains=True):
    shapes = [(queries, 1, 4, width), (keys, 1, 2, width), (keys, 1, 2, width)]
    return [torch.randn(shape).to(dtype).requires_grad_(trains) for shape in shapes]


CALL = Call(8, 8, 1, 4, 2, 16, torch.float32, gradients=True)


def test_an_announced_call_is_measured_once_and_before_it_is_made(caplog):
    fakes = Candidates(slow=2.0, quick=1.0)
    with caplog.at_level(logging.INFO, logger="megalite.kernels"):
        choice = choose_attention(fakes.kernels, [CALL], Mesh())
    assert choice == {"q 8x1x4x16, k 8x2 float32, causal, forward and backward on cpu": "quick"}
    assert fakes.measured == ["slow", "quick"] and "quick for q 8x1x4x16" in caplog.text
    fakes.attention(*heads(), causal=True, window=None, documents=None)
    assert fakes.measured == ["slow", "quick"] and fakes.called == ["quick"]


def test_a_recorded_choice_is_kept_though_another_is_faster_now(caplog):
    choice = choose_attention(Candidates(a=2.0, b=1.0).kernels, [CALL], Mesh())
    later = Candidates(a=0.5, b=1.0)
    other = dataclasses.replace(CALL, width=32)
    with caplog.at_level(logging.INFO, logger="megalite.kernels"):
        chosen = choose_attention(later.kernels, [CALL, other], Mesh(), choice)
    assert list(chosen.values()) == ["b", "a"] and later.measured == ["b", "a", "b"]
    assert "b for q 8x1x4x16, k 8x2 float32, causal, forward and backward on cpu (as before)" in caplog.text
    gone = Candidates(a=0.5, b=RuntimeError("no such backend"))
    assert list(choose_attention(gone.kernels, [CALL], Mesh(), choice).values()) == ["a"]
    assert list(choose_attention(Candidates(a=1.0).kernels, [CALL], Mesh(), choice).values()) == ["a"]


def test_candidates_as_fast_as_each_other_do_not_take_turns():
    for near in (0.98, 1.0, 1.02):
        assert list(choose_attention(Candidates(ours=1.0, theirs=near).kernels, [CALL], Mesh()).values()) == ["ours"]
    assert list(choose_attention(Candidates(ours=1.0, theirs=0.9).kernels, [CALL], Mesh()).values()) == ["theirs"]


def choose_on(rank, recorded):
    """Ranks whose measurements disagree, and of which one remembers another choice."""
    mesh = Mesh(dp=2, rank=rank)
    fakes = Candidates(a=1.0 + rank, b=2.0 - rank)
    chosen = choose_attention(fakes.kernels, [CALL], mesh, recorded[rank])
    fakes.attention(*heads())
    return list(chosen.values()), fakes.called, fakes.measured


def test_ranks_that_measure_differently_make_the_same_choice(pool):
    name = CALL.name(CPU)
    for recorded, expected in (([None, None], "a"), ([None, {name: "b"}], "a"), ([{name: "b"}, None], "b")):
        one, other = pool.run(choose_on, 2, recorded)
        assert one[:2] == other[:2] == ([expected], [expected]) and other[2] == []


def fail_on(rank):
    def broken(*tensors, **options):
        raise RuntimeError("nothing works")

    attention = MeasuredAttention({"a": broken})
    kernels = dataclasses.replace(select_kernels({}, CPU), attention=attention)
    choice = choose_attention(kernels, [CALL], Mesh(dp=2, rank=rank))
    return list(choice.values()), attention(*heads()).shape


def test_where_all_fail_every_rank_takes_torchs_own(pool):
    assert pool.run(fail_on, 2) == [(["sdpa"], (8, 1, 4, 16))] * 2


class OutOfResources(Exception):
    """As Triton's: no RuntimeError."""


@pytest.mark.parametrize("error", [OutOfResources("out of resource: shared memory"), RuntimeError("no"), ValueError()])
def test_a_candidate_that_fails_is_left_out_with_a_warning(error, caplog):
    fakes = Candidates(bad=error, good=1.0)
    choice = choose_attention(fakes.kernels, [CALL], Mesh())
    assert list(choice.values()) == ["good"]
    (record,) = (each for each in caplog.records if each.levelno >= logging.WARNING)
    assert "bad is left out for q 8x1x4x16" in record.getMessage()
    assert (str(error) or "ValueError") in record.getMessage()


def test_each_kind_of_call_that_was_not_announced_is_measured_once():
    fakes = Candidates(slow=2.0, quick=1.0, refuses=RuntimeError())
    kinds = [
        (heads(), {}),
        (heads(width=32), {}),
        (heads(dtype=torch.bfloat16), {}),
        (heads(keys=9), {}),
        (heads(), {"window": 3}),
        (heads(trains=False), {}),
        (heads(), {"documents": torch.zeros(8, 1)}),
    ]
    for number, (tensors, options) in enumerate(kinds):
        if "documents" in options:
            fakes.attention(*tensors, documents=Documents(options["documents"]))  # the same kind as a plain tensor
        fakes.attention(*tensors, **options)
        fakes.attention(*tensors, **options)
        assert len(fakes.measured) == 3 * (number + 1), f"kind {number}"
    assert set(fakes.called) == {"quick"}
    with pytest.raises(ValueError, match="head dim"):
        fakes.attention(heads()[0], *heads(width=8)[1:])


def test_generation_does_not_measure_every_length():
    fakes = Candidates(a=1.0)
    with torch.no_grad():
        for keys in range(2, 65):
            fakes.attention(*heads(1, keys))
    assert len(fakes.measured) == 6  # 2, 4, 8, 16, 32, 64 keys


def test_times_include_the_backward_only_where_it_is_wanted():
    seen = []

    def candidate(*tensors, **options):
        out = attention_reference(*tensors, **options)
        seen.append(out.requires_grad)
        time.sleep(1e-4)
        return out

    tensors = tuple(heads())
    assert seconds(candidate, tensors, {}) > 1e-4 and all(x.grad is None for x in tensors)
    with torch.no_grad():
        seconds(candidate, tensors, {})
    assert seen == [True] * 7 + [False] * 7


def test_a_measurement_inside_activation_checkpointing_leaves_it_alone():
    """Its hooks count the tensors saved for backward: not those of the measurement."""
    attention = MeasuredAttention({"a": attention_sdpa, "b": attention_sdpa})
    tensors = heads()
    out = checkpoint(attention, *tensors, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), tensors)
    want = torch.autograd.grad(attention_sdpa(*tensors).square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and len(attention.chosen) == 1


FIELDS = {"train.eval_interval": 1, "train.global_batch_size": 4}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("announced", [True, False])
def test_a_step_with_measured_attention_is_the_step_without(recompute, announced):
    """Real candidates, whether settled before the step or measured within it."""
    case = Case.of({**FIELDS, "train.recompute": recompute})
    config = case.config(1)
    attention = MeasuredAttention({"one": attention_sdpa, "other": attention_sdpa})
    results = []
    for form in (attention, attention_sdpa):
        kernels = dataclasses.replace(select_kernels({}, CPU), attention=form)
        if announced:
            choose_attention(kernels, attention_calls(config), Mesh())
        trainer = Trainer(config, Mesh(), kernels)
        trainer.initialise()
        results.append(trainer.step(micro_batches(0, 4, config, trainer.mesh, False), 1e-3))
    assert results[0] == results[1]


def test_a_resumed_run_keeps_the_choice_that_its_checkpoint_holds(tmp_path, monkeypatch):
    """Though by then another candidate is faster: same kernels, same bits."""
    recipe = str(write_recipe(tmp_path))
    for fakes, stop in ((Candidates(a=2.0, b=1.0), 3), (Candidates(a=1.0, b=2.0), 6)):
        monkeypatch.setattr("megalite.train.start.select_kernels", lambda *_, **__: fakes.kernels)  # noqa: B023
        assert main([recipe, "--train.stop_after", str(stop)]) == FINISHED
        assert set(fakes.called) == {"b"}
        manifest = json.loads((tmp_path / f"run/checkpoints/step_{stop:08d}/manifest.json").read_text())
        assert list(manifest["checkpoint"]["state"]["attention"].values()) == ["b"]


def unannounced(rank, case, layout):
    """What a step and a validation measure although all calls were announced."""
    config = case.having(layout.fields).config(layout.world)
    trainer = build_trainer(config, rank, layout.world)
    fakes = Candidates(a=1.0)
    kernels = fakes.kernels
    for stage in trainer.stages.values():
        for block in stage.layers:
            block.attention.kernels = kernels
    choose_attention(kernels, attention_calls(config), trainer.mesh)
    fakes.measured.clear()
    batches = micro_batches(0, 4, config, trainer.mesh, case.documents)
    trainer.step(batches, 1e-3)
    trainer.evaluate(batches)
    return fakes.measured, len(fakes.called)


LATENT = {
    "model.attention": "mla",
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.head_dim": 10,
    "model.kv_lora_rank": 6,
    "model.qk_nope_head_dim": 6,
    "model.qk_rope_head_dim": 4,
    "model.v_head_dim": 12,
}


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({}, Layout(tensor=2, sequence=True)),
        ({"model.heads": 6, "model.kv_heads": 3, "model.head_dim": 8}, Layout(tensor=2)),
        ({"model.heads": 12, "model.kv_heads": 4, "model.head_dim": 8}, Layout(tensor=3)),
        (LATENT, Layout(tensor=2)),
        ({"model.sliding_window": 5, "data.document_mask": True, "train.precision": "bf16"}, Layout(pipeline=2)),
    ],
)
def test_the_calls_of_a_run_are_those_that_were_announced(pool, fields, layout):
    case = Case.of({**FIELDS, **fields}, documents=bool(fields.get("data.document_mask")))
    for measured, called in pool.run(unannounced, layout.world, case, layout):
        assert measured == [] and called > 0


def test_a_backend_of_sdpa_refuses_what_it_would_not_do_itself():
    """Soft caps and log-sum-exps go to the explicit form: its time must not stand under a backend's name."""
    for call in sdpa_backends().values():
        for options in ({"softcap": 2.0}, {"return_lse": True}):
            with pytest.raises(RuntimeError, match="fused"):
                call(*heads(), **options)
        with pytest.raises(RuntimeError, match="fused"):
            call(*heads(9, 8))
    with pytest.raises(RuntimeError, match="too wide"):
        Within(attention_reference, lambda *tensors, **options: "too wide")(*heads())
    for options in ({"window": 3}, {"documents": torch.zeros(8, 1)}):
        with pytest.raises(RuntimeError, match="takes no mask"):
            sdpa_backends()["sdpa-flash"](*heads(), **options)


def test_auto_on_a_cuda_device_chooses_among_ours_and_torchs():
    """The wiring of `select_kernels`, with a device that is only named."""
    pytest.importorskip("triton")
    cuda = torch.device("cuda")
    kernels = select_kernels({}, cuda)
    assert list(kernels.attention.candidates) == ["triton", "sdpa-flash", "sdpa-cudnn", "sdpa"]
    assert kernels.taken("attention") == "measured" and "triton, sdpa-flash" in kernels.choices["attention"]
    for choices, options, taken in (
        ({"attention": "triton"}, {}, "triton"),
        ({}, {"deterministic": True}, "triton"),
        ({"attention": "sdpa"}, {"deterministic": True}, "sdpa"),
    ):
        named = select_kernels(choices, cuda, **options)
        assert named.taken("attention") == taken and not isinstance(named.attention, MeasuredAttention)
        assert choose_attention(named, [CALL], Mesh()) == {}
    with pytest.raises(UserError, match=r"kernels.attention = 'cpu': the device is cuda"):
        select_kernels({"attention": "cpu"}, cuda)


def test_sdpa_is_torchs_own_on_a_cpu_too():
    tensors = heads()
    assert "ScaledDotProduct" in type(attention_sdpa(*tensors).grad_fn.next_functions[0][0]).__name__
    for taken, form in (("sdpa", attention_sdpa), ("cpu", attention_cpu), ("auto", attention_cpu)):
        assert select_kernels({"attention": taken}, CPU).attention.__wrapped__ is form  # for heads of one width
