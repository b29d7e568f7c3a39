"""The sum of narrow products in fp32, in the one product that GPUs have for it and CPUs do not.

`products_of_a_gpu` lends the CPU those operators of torch (`addmm.dtype_out`, `mm.dtype_out`), with the checks that
CUDA makes, and notes every call.
"""

import contextlib

import pytest
import torch

from megalite.kernels import accumulate
from megalite.kernels.accumulate import accumulate_product, sums_in_the_product
from megalite.placement import placed_parameters
from tests.support.parity import Case, build_trainer, micro_batches

NARROW = [torch.bfloat16, torch.float16]


@contextlib.contextmanager
def products_of_a_gpu():
    """(grad, input, total's address) of every product that is summed in fp32, copied, in their order."""
    calls = []

    def addmm(self, mat1, mat2, out_dtype, *, beta=1, alpha=1, out):
        assert mat1.dtype == mat2.dtype and mat1.dtype in NARROW and out_dtype == out.dtype == torch.float32
        assert self.dtype == torch.float32 and beta == alpha == 1
        assert mat1.dim() == mat2.dim() == 2 and mat1.shape[1] == mat2.shape[0]
        assert self.shape == out.shape == (mat1.shape[0], mat2.shape[1])
        assert self.data_ptr() == out.data_ptr() and self.stride() == out.stride()
        calls.append((mat1.t().clone(), mat2.clone(), out.data_ptr()))
        return out.add_(mat1.float() @ mat2.float())

    def mm(self, mat2, out_dtype, *, out):
        return addmm(out.zero_(), self, mat2, out_dtype, out=out)

    with torch.library._scoped_library("aten", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        library.impl("addmm.dtype_out", addmm, "CPU")
        library.impl("mm.dtype_out", mm, "CPU")
        patch.setattr(accumulate, "sums_in_the_product", lambda device: True)
        yield calls


def error(total, exact):
    return ((total.double() - exact).norm() / exact.norm()).item()


def operands(rows, outputs, inputs, form, dtype):
    """grad [N, O] and input [N, I] with the memory layout `form`."""
    grad, x = torch.randn(rows, outputs), torch.randn(rows, inputs)
    if form == "transposed":
        grad, x = grad.t().contiguous().t(), x.t().contiguous().t()
    elif form == "columns of wider ones":
        grad, x = (torch.cat((part, part, part), 1)[:, part.shape[1] : 2 * part.shape[1]] for part in (grad, x))
    elif form == "every other row":
        grad, x = grad.repeat_interleave(2, 0)[::2], x.repeat_interleave(2, 0)[::2]
    elif form == "expanded":
        grad = grad[:1].expand(rows, outputs)
    made_dtype = grad.to(dtype), x.to(dtype)  # keeps the strides, but an expanded tensor's
    return made_dtype if form != "expanded" else (grad[:1].to(dtype).expand(rows, outputs), made_dtype[1])


@pytest.mark.fast
def test_only_cpus_round_the_product():
    assert not sums_in_the_product(torch.device("cpu"))
    assert sums_in_the_product(torch.device("cuda")) and sums_in_the_product(torch.device("cuda:3"))


@pytest.mark.fast
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("form", ["plain", "transposed", "columns of wider ones", "every other row", "expanded"])
@pytest.mark.parametrize("shape", [(7, 5, 3), (64, 33, 17), (1, 1, 1), (5, 1, 9), (3, 8, 1)])
@pytest.mark.parametrize("block_bytes", [None, 40])
def test_a_gpus_sum_is_one_product_into_the_total_and_more_exact(shape, form, dtype, block_bytes):
    grad, x = operands(*shape, form, dtype)
    whole = torch.randn(shape[1] + 2, shape[2])
    total, edges = whole[1:-1], whole[[0, -1]].clone()
    exact, rounded = total.double(), total.clone()
    with products_of_a_gpu() as calls:
        for _ in range(3):
            accumulate_product(total, grad, x, block_bytes=block_bytes)
    assert len(calls) == 3 and torch.equal(whole[[0, -1]], edges)
    for _ in range(3):
        exact += grad.double().t() @ x.double()
        accumulate_product(rounded, grad, x, block_bytes=block_bytes)
    assert error(total, exact) < 1e-6
    if total.numel() > 100:
        assert error(total, exact) < error(rounded, exact) / 50


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("rows", [0, 7])
def test_a_product_overwrites_what_no_longer_counts(rows, gpu, dtype):
    grad, x = operands(rows, 5, 3, "plain", dtype)
    whole = torch.full((7, 3), torch.nan)
    added = torch.zeros(5, 3)
    with products_of_a_gpu() if gpu else contextlib.nullcontext():
        accumulate_product(whole[1:-1], grad, x, overwrite=True)
        accumulate_product(added, grad, x)
    assert torch.equal(whole[1:-1], added) and whole[[0, -1]].isnan().all()


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty_factors_add_nothing(shape):
    grad, x = operands(*shape, "plain", torch.bfloat16)
    total = torch.randn(shape[1], shape[2])
    kept = total.clone()
    with products_of_a_gpu() as calls:
        accumulate_product(total, grad, x)
    accumulate_product(total, grad, x)
    accumulate_product(total, grad, x, block_bytes=16)
    assert len(calls) == 1 and torch.equal(total, kept)


@pytest.mark.fast
@pytest.mark.parametrize("rows", [0, 6])
def test_torch_takes_these_arguments_on_another_device(rows):
    """The meta device checks overload, shapes and dtypes, and that the result is the total itself, not resized."""
    total = torch.empty(5, 3, device="meta")
    grad, x = torch.empty(rows, 5, 3, device="meta", dtype=torch.bfloat16).unbind(2)[0], torch.empty(rows, 3).to("meta")
    for overwrite in (False, True):
        accumulate_product(total, grad, x.bfloat16(), overwrite=overwrite)
    assert total.shape == (5, 3) and total.stride() == (3, 1)


KINDS = {
    "plain": {"model.attention_bias": True},
    "experts": {"model.experts": 4, "model.experts_per_token": 2},
    "adapter": {"adapter.kind": "lora", "adapter.rank": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_a_model_gets_its_gradient_without_a_rounding(kind):
    """Against the sum in float64 of the very factors, where a CPU's own way is off by the rounding to bf16."""
    config = Case.of({"train.precision": "bf16", "model.hidden_size": 24} | KINDS[kind]).config(1)

    def gradients():
        trainer = build_trainer(config, 0, 1)
        for parameter in placed_parameters(trainer.stages[0]):
            if not parameter.any():  # an adapter begins with zeros, and then its other half has no gradient
                parameter.detach().fill_(0.1)
        trainer.accumulate(micro_batches(0, 2, config, trainer.mesh, False))
        return [
            parameter.main_grad
            for parameter in placed_parameters(trainer.stages[0])
            if parameter.requires_grad
            and parameter.dim() == 2
            and parameter.placement.role != "embedding"
            and ".gate." not in parameter.placement.boxes[0].name  # routers multiply in fp32
        ]

    rounded = gradients()
    with products_of_a_gpu() as calls:
        exact = gradients()
    assert len(exact) > 3
    for total, narrow in zip(exact, rounded):
        first, columns = total.data_ptr(), total.shape[1]
        wide, used = torch.zeros(total.shape, dtype=torch.float64), 0
        for grad, x, address in calls:
            row = (address - first) // (4 * columns)
            if 0 <= row < len(total):
                wide[row : row + grad.shape[1]] += grad.double().t() @ x.double()
                used += 1
        assert used >= 2 and error(total, wide) < 1e-6
        assert error(narrow, wide) > 1e-4
