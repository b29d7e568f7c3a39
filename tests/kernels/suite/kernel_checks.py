"""What the kernels' tests share: strided inputs, float64 copies, and the error that is allowed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """|actual - expected| <= allowed * |expected| (Frobenius norms), and nothing is NaN."""
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN of {actual.numel()}"
    error, scale = (actual - expected).norm().item(), expected.norm().item()
    limit = factor * ALLOWED[dtype] * scale + 1e-6
    assert error <= limit, f"{name}: error {error:.3e} of {scale:.3e}, allowed {limit:.3e}"


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def compare(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    factor: float = 1.0,
) -> None:
    """Outputs and gradients of `kernel` against those of `reference` in float64, for random output gradients."""
    narrow = [leaf(x) for x in inputs]
    wide = [leaf(x.double()) for x in inputs]
    got, want = kernel(*narrow), reference(*wide)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    upstream = [torch.randn_like(x) for x in got]
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        close(f"output {index}", a, b, dtype, factor)
    grads = torch.autograd.grad(got, narrow, upstream)
    expected = torch.autograd.grad(want, wide, [x.double() for x in upstream])
    for index, (a, b) in enumerate(zip(grads, expected, strict=True)):
        close(f"gradient of input {index}", a, b, dtype, factor)
