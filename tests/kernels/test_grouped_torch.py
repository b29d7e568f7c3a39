"""torch's grouped product as an implementation of ours: the same results, and the plain loop where it cannot."""

import logging

import pytest
import torch

from megalite.errors import UserError
from megalite.kernels import grouped, grouped_torch, select_kernels

CPU = torch.device("cpu")
pytestmark = pytest.mark.fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5,), (0, 70, 0, 1, 33, 0), (0, 0), (1,) * 9])
def test_products_and_both_gradients(dtype, sizes):
    ends, rows, (inputs, outputs) = torch.tensor(sizes).cumsum(0), sum(sizes), (40, 24)
    x, grad = (torch.randn(rows, 2 * width)[:, :width].to(dtype) for width in (inputs, outputs))
    weight, total = torch.randn(len(sizes), outputs, inputs).to(dtype), torch.randn(len(sizes), outputs, inputs)
    close = {"rtol": 2e-2, "atol": 0.25} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for name, arguments in (("grouped_product", (x, weight)), ("grouped_input_gradient", (grad, weight))):
        ours, plain = (getattr(module, name)(*arguments, ends) for module in (grouped_torch, grouped))
        assert ours.dtype == dtype and ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, **close)
    expected, kept = grouped.grouped_weight_gradient_(total.clone(), grad, x, ends), total.clone()
    assert grouped_torch.grouped_weight_gradient_(total, grad, x, ends) is total
    torch.testing.assert_close(total, expected, **close)
    empty = torch.tensor([size == 0 for size in sizes])
    assert torch.equal(total[empty], kept[empty])


def test_what_it_cannot_take_goes_to_the_loop(caplog):
    kernels = select_kernels({"grouped": "torch"}, CPU)
    assert kernels.choices["grouped"] == "torch" and kernels.choices["rope"].startswith("native")
    x, weight, ends = torch.randn(6, 7), torch.randn(2, 8, 7), torch.tensor([2, 6])
    with caplog.at_level(logging.WARNING, "megalite.kernels"):
        y = kernels.grouped_product(x, weight, ends)
        total = kernels.grouped_weight_gradient_(torch.zeros(2, 8, 7), torch.randn(6, 8), x, ends)
    assert torch.equal(y, grouped.grouped_product(x, weight, ends)) and total.any()
    assert "rows that are no multiple of 16 bytes" in caplog.text


def test_it_is_a_choice_for_grouped_products_alone():
    from megalite.config import build_config

    assert build_config({"kernels": {"grouped": "torch"}}).kernels.grouped == "torch"
    with pytest.raises(UserError, match=r"kernels\.rope = 'torch' is not one of auto, triton, reference"):
        build_config({"kernels": {"rope": "torch"}})
