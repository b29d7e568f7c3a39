"""Symmetric products in Triton against plain ones in float64: odd sizes, strides, an addend or none."""

import pytest
import torch

from megalite.kernels import symmetric, symmetric_triton
from megalite.optim.muon import newton_schulz
from tests.kernels.suite.kernel_checks import close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (33, 200), (150, 70), (1, 1), (3, 0)])
def test_with_and_without_an_addend(device, dtype, rows, columns):
    a = torch.randn(rows, columns, device=device).to(dtype)
    half = torch.randn(rows, rows, device=device)
    addend = (half + half.T).to(dtype)
    for arguments, options in (((a,), {}), ((a,), {"alpha": 0.3}), ((a, addend), {"alpha": 2.0, "beta": -4.5})):
        ours = symmetric_triton.symmetric_product(*arguments, **options)
        wide = symmetric.symmetric_product(*(tensor.double() for tensor in arguments), **options)
        close("product", ours, wide, dtype)
        assert torch.equal(ours, ours.T)


def test_transposed_and_cut_matrices_are_read_in_place(device):
    whole = torch.randn(70, 90, device=device)
    addend = torch.randn(70, 70, device=device)
    addend = addend + addend.T
    for a in (whole[:, 5:50], whole.T[:70, :60], whole[:, ::2]):
        ours = symmetric_triton.symmetric_product(a, addend, alpha=0.5)
        close("product", ours, symmetric.symmetric_product(a.double(), addend.double(), alpha=0.5), a.dtype)


def test_newton_schulz_with_it(device):
    for shape in ((48, 36), (36, 60)):
        matrix = torch.randn(shape, device=device)
        expected = newton_schulz(matrix, 5)
        ours = newton_schulz(matrix, 5, symmetric_triton.symmetric_product)
        assert (ours - expected).abs().max() < 1e-4
