"""Gated activations (Shazeer 2020, "GLU Variants Improve Transformer", section 2): the specification in plain PyTorch.

    swiglu    y = silu(gate) * up,  with gate and up the two halves of one fused projection
    geglu     y = gelu(gate) * up,  with GELU's tanh form (Hendrycks and Gimpel 2016)

The activation is rounded to the input's dtype before the product, as in Hugging Face Llama and Gemma. The backward is
written by hand so that only the fused input is kept for it. The Triton form of SwiGLU with the same signature is in
`swiglu_triton.py`; GeGLU has this form alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def check(gate_up: Tensor) -> None:
    """Raise ValueError if the last dimension is odd; both forms call it first."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2 F], not {tuple(gate_up.shape)}")


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]: the gate is the first half, `silu(gate) * up`."""
    check(gate_up)
    result: Tensor = _Gated.apply(gate_up, _SILU)
    return result


def geglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]: the gate is the first half, `gelu(gate) * up`."""
    check(gate_up)
    result: Tensor = _Gated.apply(gate_up, _GELU)
    return result


def swiglu_again(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """(swiglu(gate_up) [..., F], the gradient of gate_up [..., 2F] given that of the result): what backward needs where
    the result was not kept. Without a graph."""
    check(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up), _gradient(gate_up, grad, _SILU)


class _Activation(NamedTuple):
    """gate -> activated gate; and (gradient, gate, `grad_input` to write) -> gradient of the gate."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]


# d silu(g)/dg = sigmoid(g) * (1 + g * (1 - sigmoid(g))), which is what aten::silu_backward multiplies by.
_SILU = _Activation(F.silu, torch.ops.aten.silu_backward.grad_input)
_GELU = _Activation(
    partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh")
)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: _Activation) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gate, up = gate_up.chunk(2, dim=-1)
        return activation.forward(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        return _gradient(gate_up, grad, ctx.activation), None


def _gradient(gate_up: Tensor, grad: Tensor, activation: _Activation) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    activation.backward(grad * up, gate, grad_input=grad_gate)
    torch.mul(grad, activation.forward(gate), out=grad_up)
    return grad_gate_up
