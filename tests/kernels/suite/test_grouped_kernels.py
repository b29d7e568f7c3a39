"""Grouped products in Triton against the plain loop in float64: groups of any size, empty ones, odd widths."""

import pytest
import torch

from megalite.kernels import grouped, grouped_triton
from tests.kernels.suite.kernel_checks import close

GROUPS = [
    (5,),
    (0, 70, 0, 1, 33, 0),
    (128, 0, 129, 7),
    (0, 0),
    (1,) * 9,
    (0,) * 40 + (3,) + (0,) * 30,
]


def ends_of(sizes, device):
    return torch.tensor(sizes, device=device).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", GROUPS, ids=lambda sizes: f"{len(sizes)}_groups_{sum(sizes)}_rows")
@pytest.mark.parametrize(("inputs", "outputs"), [(40, 24), (17, 150), (1, 1)])
def test_products_and_both_gradients(device, dtype, sizes, inputs, outputs):
    ends, rows = ends_of(sizes, device), sum(sizes)
    x, grad = (torch.randn(rows, width, device=device).to(dtype) for width in (inputs, outputs))
    weight = torch.randn(len(sizes), outputs, inputs, device=device).to(dtype)
    total = torch.randn(len(sizes), outputs, inputs, device=device)
    wide = [tensor.double() for tensor in (x, grad, weight, total)]
    close(
        "output",
        grouped_triton.grouped_product(x, weight, ends),
        grouped.grouped_product(wide[0], wide[2], ends),
        dtype,
    )
    close(
        "input gradient",
        grouped_triton.grouped_input_gradient(grad, weight, ends),
        grouped.grouped_input_gradient(wide[1], wide[2], ends),
        dtype,
    )
    expected = grouped.grouped_weight_gradient_(wide[3], wide[1], wide[0], ends)
    kept = total.clone()
    close("weight gradient", grouped_triton.grouped_weight_gradient_(total, grad, x, ends), expected, dtype)
    empty = torch.tensor([size == 0 for size in sizes], device=device)
    assert torch.equal(total[empty], kept[empty])


def test_rows_of_a_wider_tensor_are_read_in_place(device):
    whole = torch.randn(50, 64, device=device)
    ends, weight = ends_of((20, 0, 30), device), torch.randn(3, 12, 30, device=device)
    for x in (whole[:, 4:34], whole[:, :60:2]):
        close(
            "output",
            grouped_triton.grouped_product(x, weight, ends),
            grouped.grouped_product(x.double(), weight.double(), ends),
            x.dtype,
        )
