"""Linear layers in FP8: as exact as three bits of mantissa allow at any magnitude, and good enough to train with."""

import pytest
import torch

from megalite.kernels import select_kernels
from megalite.optim.lr_schedule import learning_rate
from megalite.parallel.fp8 import products_of
from megalite.parallel.products import PLAIN
from tests.support.parity import Case, build_trainer, micro_batches

KERNELS = select_kernels({}, torch.device("cpu"))
TENSOR, ROW, BLOCK = (products_of(name, KERNELS) for name in ("tensor", "row", "block"))
ALL = pytest.mark.parametrize("products", [TENSOR, ROW, BLOCK], ids=["tensor", "row", "block"])

MODEL = {
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 48,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.head_dim": 16,
    "train.precision": "bf16",
    "train.steps": 40,
}


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


def factors():
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    weight = torch.randn(48, 64, dtype=torch.bfloat16)
    grad = torch.randn(3, 5, 48, dtype=torch.bfloat16)
    return x, weight, grad


@pytest.mark.fast
@ALL
@pytest.mark.parametrize("magnitude", [1e-8, 1.0, 1e6])
def test_products_are_right_at_any_magnitude(products, magnitude):
    x, weight, grad = factors()
    bias = torch.randn(48, dtype=torch.bfloat16) * magnitude
    x, grad = x * magnitude, grad * magnitude
    exact = x.double() @ weight.double().t() + bias.double()
    assert 0.005 < error(products.output(x, weight, bias), exact) < 0.05  # not exact either: it was FP8
    assert 0.01 < error(products.input_gradient(grad, weight), grad.double() @ weight.double()) < 0.08


@pytest.mark.fast
@pytest.mark.parametrize("products", [TENSOR, ROW, BLOCK, PLAIN], ids=["tensor", "row", "block", "plain"])
def test_products_are_written_where_they_are_wanted(products):
    x, weight, grad = factors()
    for bias in (None, torch.randn(48, dtype=torch.bfloat16)):
        whole = torch.full((5, 5, 48), torch.nan, dtype=torch.bfloat16)
        products.output(x, weight, bias, out=whole[1:4])
        assert torch.equal(whole[1:4], products.output(x, weight, bias))
        assert whole[0].isnan().all() and whole[4].isnan().all()
    whole = torch.full((5, 5, 64), torch.nan, dtype=torch.bfloat16)
    products.input_gradient(grad, weight, out=whole[1:4])
    assert torch.equal(whole[1:4], products.input_gradient(grad, weight))
    assert whole[0].isnan().all() and whole[4].isnan().all()


@pytest.mark.fast
def test_a_scale_for_each_row_keeps_small_rows():
    x, weight, _ = factors()
    x[1] *= 1e-7
    exact = x.double() @ weight.double().t()
    assert error(ROW.output(x, weight, None)[1], exact[1]) < 0.05
    assert error(TENSOR.output(x, weight, None)[1], exact[1]) > 0.5


@pytest.mark.fast
def test_a_scale_for_each_block_keeps_small_numbers_beside_large_ones():
    x, weight = torch.randn(4, 256, dtype=torch.bfloat16), torch.randn(48, 256, dtype=torch.bfloat16)
    x[:, 0], weight[:, :128] = 1e8, 0
    exact = x.double() @ weight.double().t()
    assert error(BLOCK.output(x, weight, None), exact) < 0.05
    assert error(ROW.output(x, weight, None), exact) > 0.5


@pytest.mark.fast
@ALL
def test_zeros_stay_zeros(products):
    x, weight, _ = factors()
    x[0] = 0
    assert not products.output(x, weight, None)[0].any()
    assert not products.output(torch.zeros_like(x), weight, None).any()


@pytest.mark.fast
@ALL
def test_no_tokens_have_no_results(products):
    _, weight, _ = factors()
    assert products.output(torch.empty(0, 5, 64, dtype=torch.bfloat16), weight, None).shape == (0, 5, 48)


@pytest.mark.fast
@pytest.mark.parametrize("products", [TENSOR, ROW], ids=["tensor", "row"])
def test_forward_alone_accumulates_fast(products, monkeypatch):
    """Processors ignore it, so it is seen in the calls."""
    asked = []
    plain = torch._scaled_mm

    def watched(*operands, use_fast_accum=False, **options):
        asked.append(use_fast_accum)
        return plain(*operands, use_fast_accum=use_fast_accum, **options)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    x, weight, grad = factors()
    products.output(x, weight, None)
    products.input_gradient(grad, weight)
    assert asked == [True, False]


def losses(fp8):
    """The losses of 40 steps over the same four samples."""
    config = Case.of({**MODEL, "train.fp8": fp8}).config(1)
    trainer = build_trainer(config, 0, 1)
    batches = micro_batches(0, 4, config, trainer.mesh, documents=False)
    return torch.tensor([trainer.step(batches, learning_rate(step, config)).loss for step in range(1, 41)])


@pytest.mark.parametrize("fp8", ["tensor", "row", "block"])
def test_training_follows_the_losses_of_bf16(fp8):
    plain, ours = losses("none"), losses(fp8)
    assert plain[-1] < 0.8 * plain[0]
    assert not torch.equal(plain, ours)
    assert (ours / plain - 1).abs().max() < 0.03


@pytest.mark.fast
def test_names_of_the_configuration():
    assert ROW.per_row and not TENSOR.per_row
    x, weight, _ = factors()
    assert torch.equal(products_of("none", KERNELS).output(x, weight, None), x @ weight.t())
