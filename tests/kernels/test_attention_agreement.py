"""No wrong attention is chosen by `auto`: candidates are compared with the reference, unproven ones in a child."""

import dataclasses
import json
import logging
import math
import random
import sys

import pytest
import torch

from megalite.kernels import select_kernels
from megalite.kernels.attention import attention_reference, trial
from megalite.kernels.attention.agreement import MOST_ROWS, blocks, disagreement
from megalite.kernels.attention.call import Call
from megalite.kernels.attention.choice import Checks, MeasuredAttention, Within, choose_attention, seconds
from megalite.kernels.attention.sdpa import attention_sdpa
from megalite.mesh import Mesh

pytestmark = pytest.mark.fast
CPU = torch.device("cpu")
CALL = Call(450, 450, 1, 2, 1, 16, torch.bfloat16, gradients=True)


class Bent(torch.autograd.Function):
    """Adds something to one number, or to one number of the gradient."""

    @staticmethod
    def forward(ctx, x, at, forward, backward):
        ctx.at, ctx.backward = at, backward
        x = x.clone()
        x[at] += forward
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.at] += ctx.backward
        return grad, None, None, None


def bent(which, at, forward=0.0, backward=0.0):
    """The reference with a fault in its output or in one of its inputs."""

    def attention(*tensors, **options):
        tensors = list(tensors)
        if which < 3:
            tensors[which] = Bent.apply(tensors[which], at, forward, backward)
        result = attention_reference(*tensors, **options)
        out, *rest = result if isinstance(result, tuple) else (result,)
        out = Bent.apply(out, at, forward, backward) if which == 3 else out
        return (out, *rest) if rest else out

    return attention


def one_key_too_many(*tensors, **options):
    """A mask that is off by one: queries see the key after them."""
    q, k, v = (torch.cat([x, x[-1:]]) for x in tensors)
    return attention_reference(q, k, v, **options)[1:]


KINDS = [
    {},
    {"window": 40},
    {"causal": False},
    {"documents": True},
    {"queries": 100, "keys": 130},
    {"queries": 130, "keys": 100},
    {"softcap": 3.0, "return_lse": True},
    {"gradients": False, "queries": 1},
]


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forms_that_compute_attention_agree(fields, dtype):
    tensors, options = dataclasses.replace(CALL, dtype=dtype, **fields).example(CPU)
    with torch.enable_grad():
        for form in (attention_reference, attention_sdpa):
            assert disagreement(form, tensors, options) is None


@pytest.mark.parametrize("fields", KINDS)
def test_a_number_that_is_wrong_is_found(fields):
    """Anywhere in the compared rows, in any head: of the output, or of a gradient."""
    call = dataclasses.replace(CALL, **fields)
    tensors, options = call.example(CPU)
    row = call.queries - 1 - random.randrange(min(MOST_ROWS, call.queries))
    at = (row, 0, random.randrange(2), random.randrange(16))
    assert disagreement(bent(3, at, forward=9.0), tensors, options).startswith("its output is not")
    assert "nan" in disagreement(bent(3, at, forward=math.nan), tensors, options)
    if call.gradients:
        for which, name in enumerate("qkv"):
            here = (row, *at[1:]) if name == "q" else (random.randrange(call.keys), 0, at[2] // 2, at[3])
            fault = disagreement(bent(which, here, backward=90.0), tensors, options)
            assert fault.startswith(f"its gradient of {name} is not"), fault


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mask_that_is_off_by_one_is_found_in_the_first_rows(dtype):
    tensors, options = dataclasses.replace(CALL, queries=3000, keys=3000, dtype=dtype).example(CPU)
    assert "its output is not the reference's" in disagreement(one_key_too_many, tensors, options)


def test_the_compared_queries_are_first_middle_and_last():
    assert blocks(5000, 6000, 100, True) == [range(100), range(2450, 2550), range(4900, 5000)]
    assert blocks(5000, 5000, 100, False) == blocks(5000, 40, 100, True) == [range(4900, 5000)]
    assert blocks(300, 9000, 100, True) == [range(300)]


def chosen(candidates, **checks):
    found = MeasuredAttention(candidates, Checks(**{**CHECKS, **checks}))
    kernels = dataclasses.replace(select_kernels({}, CPU), attention=found)
    return list(choose_attention(kernels, [CALL], Mesh()).values()), found


CHECKS = {"seconds": seconds, "disagreement": disagreement, "admitted": lambda name, calls, device: set(calls)}


def test_a_fast_candidate_with_a_wrong_gradient_is_left_out_with_a_warning(caplog):
    def fast(candidate, *_):
        return 1.0 if candidate is wrong else 2.0

    wrong = bent(1, (7, 0, 0, 3), backward=90.0)
    assert chosen({"wrong": wrong, "right": attention_sdpa}, seconds=fast)[0] == ["right"]
    (record,) = (each for each in caplog.records if each.levelno >= logging.WARNING)
    assert "wrong is left out for q 450x1x2x16" in record.getMessage()
    assert "its gradient of k is not the reference's: relative error" in record.getMessage()
    assert chosen({"wrong": wrong})[0] == ["sdpa"]
    attention = MeasuredAttention({"wrong": wrong, "right": attention_sdpa}, Checks(**{**CHECKS, "seconds": fast}))
    attention(*CALL.example(CPU)[0])  # a kind that was not announced
    assert list(attention.chosen.values()) == ["right"]


def test_a_recorded_candidate_that_is_wrong_by_now_is_not_kept():
    attention = MeasuredAttention({"a": bent(3, (449, 0, 0, 0), forward=9.0), "b": attention_sdpa})
    assert attention.decide(CALL, CPU, "a") == "b"


def test_an_unproven_candidate_is_used_only_for_calls_that_its_trial_admitted():
    asked = []

    def trying(name, calls, device):
        asked.append((name, calls))
        return set(calls)

    form = Within(attention_sdpa, lambda q, *_, **__: "too narrow" if q.shape[-1] < 16 else None)
    taken, attention = chosen({"gluon": form}, admitted=trying)
    assert taken == ["gluon"] and asked == [("gluon", [CALL])]
    assert chosen({"gluon": form}, admitted=lambda *_: set())[0] == ["sdpa"]
    attention(*dataclasses.replace(CALL, queries=40, keys=40).example(CPU)[0])  # a kind that was not announced
    assert list(attention.chosen.values()) == ["gluon", "sdpa"]
    attention.try_unproven([dataclasses.replace(CALL, width=8)], CPU)
    assert asked[-1] == ("gluon", [])  # no process is started for what the form refuses


def test_a_trial_runs_in_a_process_of_its_own(caplog):
    """A real one, of torch's operator."""
    capped = dataclasses.replace(CALL, softcap=2.0)
    assert trial.admitted("sdpa-flash", [CALL, capped], CPU) == {CALL}
    (record,) = caplog.records
    assert "softcap 2.0, forward and backward on cpu: not a call that the fused operators do" in record.getMessage()


ENDINGS = [
    ("import time; time.sleep(60)", "its trial took more than 3 seconds"),
    ("import os; os._exit(7)", "its trial ended with status 7: no message"),
    ("print('half a li', end='')", "its trial ended with status 0: no message"),
]


@pytest.mark.parametrize(("program", "reason"), ENDINGS)
def test_a_trial_that_hangs_or_dies_admits_what_it_had_answered(program, reason, monkeypatch, caplog, tmp_path):
    """The child is a script that answers for the first call, and then ends in some way."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nprint('{json.dumps({'call': 0, 'fault': None})}', flush=True)\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(trial.sys, "executable", str(script))
    other = dataclasses.replace(CALL, width=32)
    assert trial.admitted("gluon", [CALL, other], CPU, seconds=3.0) == {CALL}
    (record,) = caplog.records
    assert f"gluon is left out for {other.name(CPU)}: {reason}" in record.getMessage()
    assert trial.admitted("gluon", [], CPU) == set()
