"""Cross-entropy and AdamW in Triton against their float64 references."""

import pytest
import torch
import torch.nn.functional as F

from megalite.kernels import adamw, adamw_triton, cross_entropy, cross_entropy_triton
from tests.kernels.suite.kernel_checks import close

DTYPES = [torch.float32, torch.bfloat16]


def targets_for(tokens, size, device, ignored=0.3):
    targets = torch.randint(0, size, (tokens,), device=device)
    targets[torch.rand(tokens, device=device) < ignored] = -100
    return targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "valid"), [(9001, 9001), (128, 101), (5, 5), (1, 1)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy(device, dtype, columns, valid, z_loss):
    logits = 3 * torch.randn(6, columns, device=device).to(dtype)
    logits[:, valid:] = torch.nan  # padding must not be read
    targets = targets_for(6, valid, device)
    kept, wide = targets != -100, logits[:, :valid].double().requires_grad_()
    stats = cross_entropy_triton.cross_entropy_stats(logits, targets, valid=valid)
    got = cross_entropy.cross_entropy_loss(stats, targets, vocab_size=valid, z_loss=z_loss)
    penalty = z_loss * wide.logsumexp(-1).square() * kept
    expected = F.cross_entropy(wide, targets, reduction="none") + penalty
    close("loss", got, expected, torch.float32)
    grad_N = torch.rand(6, device=device) * kept
    cross_entropy_triton.cross_entropy_grad_(logits, targets, stats, grad_N, valid=valid, z_loss=z_loss)
    (want,) = torch.autograd.grad(expected, wide, grad_N.double())
    close("gradient", logits[:, :valid], want, dtype)
    assert (logits[:, valid:] == 0).all()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sharded_vocabulary(device, ranks):
    """Shards with padding (the last one all padding for 3 ranks), merged, against torch on the whole vocabulary."""
    vocab, width = 90, {1: 100, 2: 50, 3: 45}[ranks]
    whole = 2 * torch.randn(8, ranks * width, device=device)
    targets = targets_for(8, vocab, device)
    grad_N = torch.rand(8, device=device) * (targets != -100)
    shards = [whole[:, r * width : (r + 1) * width].clone() for r in range(ranks)]
    places = [{"vocab_start": r * width, "valid": min(max(vocab - r * width, 0), width)} for r in range(ranks)]
    stats = cross_entropy.merge_stats(
        torch.stack([cross_entropy_triton.cross_entropy_stats(s, targets, **p) for s, p in zip(shards, places)])
    )
    wide = whole[:, :vocab].double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    loss = cross_entropy.cross_entropy_loss(stats, targets, vocab_size=vocab)
    close("loss", loss, expected, torch.float32)
    for shard, place in zip(shards, places):
        cross_entropy_triton.cross_entropy_grad_(shard, targets, stats, grad_N, **place)
    (want,) = torch.autograd.grad(expected, wide, grad_N.double())
    got = torch.cat(shards, 1)
    close("gradient", got[:, :vocab], want, torch.float32)
    assert (got[:, vocab:] == 0).all()


def test_everything_ignored_is_zero_even_for_broken_logits(device):
    logits = torch.full((3, 300), torch.nan, device=device)
    targets = torch.full((3,), -100, device=device)
    stats = cross_entropy_triton.cross_entropy_stats(logits, targets)
    assert (cross_entropy.cross_entropy_loss(stats, targets, vocab_size=300) == 0).all()
    cross_entropy_triton.cross_entropy_grad_(logits, targets, stats, torch.zeros(3, device=device))
    assert (logits == 0).all()


def test_huge_common_offset_and_masked_logits(device):
    logits = torch.randn(4, 1000, device=device) + 3e4
    logits[:, ::3] = -torch.inf
    targets = torch.full((4,), 1, device=device)
    stats = cross_entropy_triton.cross_entropy_stats(logits, targets)
    loss = cross_entropy.cross_entropy_loss(stats, targets, vocab_size=1000)
    close("loss", loss, F.cross_entropy(logits.double(), targets, reduction="none"), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_launch_for_statistics_and_gradient(device, dtype):
    """Strided rows (a slice of a wider buffer); what lies beside the slice is left alone."""
    buffer = torch.randn(5, 9300, device=device).to(dtype)
    before = buffer.clone()
    logits = buffer[:, 50:8350]
    targets, grad_N = targets_for(5, 8200, device), torch.rand(5, device=device)
    grad_N *= targets != -100
    expected = before[:, 50:8350].double()
    options = {"valid": 8200, "z_loss": 1e-3}
    want = cross_entropy.cross_entropy_stats_grad_(expected, targets, grad_N, **options)
    got = cross_entropy_triton.cross_entropy_stats_grad_(logits, targets, grad_N, **options)
    close("statistics", got, want, torch.float32)
    close("gradient", logits, expected, dtype)
    assert torch.equal(buffer[:, :50], before[:, :50]) and torch.equal(buffer[:, 8350:], before[:, 8350:])


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 1024, 5000])
def test_adamw(device, grad_dtype, count):
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    state = [torch.randn(count, device=device), torch.zeros(count, device=device), torch.zeros(count, device=device)]
    wide = [x.double() for x in state]
    param = torch.empty(count, device=device, dtype=torch.bfloat16)
    for step in (1, 2, 3):
        grad = torch.randn(count, device=device).to(grad_dtype)
        scale = torch.rand((), device=device)
        w, m, v = state
        adamw_triton.adamw_(w, grad, m, v, step=step, grad_scale=scale, param_out=param, **options)
        adamw.adamw_(wide[0], grad.double(), wide[1], wide[2], step=step, grad_scale=scale.double(), **options)
        for name, a, b in zip(("weights", "first moment", "second moment"), state, wide):
            close(name, a, b, torch.float32)
        assert torch.equal(param, w.bfloat16())


@pytest.mark.parametrize("count", [0, 1, 1023, 20000])
def test_square_sum(device, count):
    flat = 1e3 * torch.randn(count, device=device)
    got = adamw_triton.square_sum(flat)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, flat.double().square().sum(), rtol=1e-12, atol=0)


def test_losses_and_sums_repeat_bitwise(device):
    logits, targets = torch.randn(20, 9000, device=device).bfloat16(), targets_for(20, 9000, device)
    grad_N, flat = torch.rand(20, device=device), torch.randn(50_000, device=device)

    def run():
        z = logits.clone()
        return cross_entropy_triton.cross_entropy_stats_grad_(z, targets, grad_N), z, adamw_triton.square_sum(flat)

    first, *others = (run() for _ in range(2 if device.type == "cpu" else 30))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
