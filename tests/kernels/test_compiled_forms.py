"""What `train.compile` puts in place of the plain forms: the same numbers and gradients, one line where it cannot."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from megalite.errors import UserError
from megalite.kernels import Kernels, compiled, cross_entropy, rms_norm, rope, select_kernels, swiglu

CPU = torch.device("cpu")


def gradients(function, *inputs):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outputs]
    return outputs, torch.autograd.grad(outputs, inputs, grads)


@pytest.mark.fast
def test_forms_have_the_values_and_gradients_of_the_specification():
    x, residual = (torch.randn(7, 3, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(10, dtype=torch.float64, requires_grad=True)
    assert_close(
        gradients(lambda *all: compiled.add_rms_norm(*all, 1e-5), x, residual, weight),
        gradients(lambda *all: rms_norm.add_rms_norm(*all, 1e-5), x, residual, weight),
    )
    assert_close(gradients(compiled.swiglu, x), gradients(swiglu.swiglu, x))
    q, k = (torch.randn(7, 3, heads, 10, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    for table in (torch.randn(7, 8), torch.randn(7, 3, 8)):
        assert_close(
            gradients(lambda *both, t=table: compiled.rope(*both, t, t.flip(0)), q, k),
            gradients(lambda *both, t=table: rope.rope(*both, t, t.flip(0)), q, k),
        )


@pytest.mark.fast
@pytest.mark.parametrize(("start", "valid"), [(0, 21), (20, 17)])
def test_cross_entropy_forms_are_the_specification(start, valid):
    """A whole vocabulary and a shard with padded columns; ignored rows with infinite logits, targets elsewhere."""
    logits = 4 * torch.randn(9, 21, dtype=torch.float64)
    logits[2] = torch.inf
    targets, scale = torch.randint(0, 40, (9,)), torch.rand(9, dtype=torch.float64)
    targets[2], scale[2] = -100, 0.0
    stats = cross_entropy.cross_entropy_stats(logits, targets, vocab_start=start, valid=valid)
    assert_close(compiled.cross_entropy_stats(logits, targets, vocab_start=start, valid=valid), stats, equal_nan=True)
    ours, theirs = logits.clone(), logits.clone()
    options = {"vocab_start": start, "valid": valid, "z_loss": 0.01, "vocab_size": 40}
    compiled.cross_entropy_grad_(ours, targets, stats, scale, **options)
    cross_entropy.cross_entropy_grad_(theirs, targets, stats, scale, **options)
    assert_close(ours, theirs)
    assert not ours[2].any()


@pytest.mark.fast
def test_only_plain_element_wise_forms_are_replaced(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: ("compiled", function))
    plain = select_kernels({}, CPU)
    fused = dataclasses.replace(plain, choices={**plain.choices, "rope": "triton (auto)"})
    chosen = compiled.compile_kernels(fused)
    changed = {
        entry.name
        for entry in dataclasses.fields(Kernels)
        if entry.name != "choices" and getattr(chosen, entry.name) is not getattr(plain, entry.name)
    }
    losses = {"cross_entropy_stats", "cross_entropy_grad_", "cross_entropy_stats_grad_"}
    assert changed == {"rms_norm", "add_rms_norm", "swiglu", *losses}
    assert chosen.choices["swiglu"].startswith("compiled") and chosen.choices["rope"] == "triton (auto)"
    assert chosen.choices["attention"] == plain.choices["attention"]


@pytest.mark.fast
def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"train\.compile = true: no C"):
        compiled.compile_kernels(select_kernels({}, CPU))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(compiled.shutil.which, compiled.COMPILERS)), reason="no C++ compiler")
def test_compiled_operations_train_like_the_plain_ones():
    """Through the compiler itself: a norm and SwiGLU with their gradients, in bf16."""
    kernels = select_kernels({}, CPU)
    fused = compiled.compile_kernels(kernels)
    x = torch.randn(64, 2, 32).bfloat16().requires_grad_()
    weight = torch.randn(32).bfloat16().requires_grad_()
    got, expected = (
        gradients(lambda *both, one=one: one.swiglu(one.rms_norm(*both, 1e-5)), x, weight) for one in (fused, kernels)
    )
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1])):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
