"""The plain forms' operations on a CPU, compiled: each in one pass over memory, forward and backward, fp32 and bf16.

The bodies are C++ (`kernels/cpu/`), built with megalite; `_cpu` has them for several sets of instructions, and the best
that the processor has is taken. Values and gradients are those of the plain forms up to the rounding of sums, and do
not depend on the number of threads.

Shapes: N rows, H hidden, S sequence, B batch, H query and K kv heads, D head dim, F features, V columns of the logits.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cross_entropy as cross_entropy_plain
from . import rms_norm as rms_norm_plain
from . import rope as rope_plain
from . import swiglu as swiglu_plain
from .attention.parts import PLAIN_PARTS, Seen

NORM_ROWS = 64  # rows whose share of a norm weight's gradient is one partial sum: kRows of `cpu/rows.h`
DTYPES = (torch.float32, torch.bfloat16)
NOWHERE = (0, 0, 0, 0)


def extension() -> Any:
    """The extension module with all instruction sets; `usable` lists those of this processor, best first."""
    return import_module(f"{__package__}._cpu")


@cache
def obstacle() -> str | None:
    """Why there are no compiled kernels here, or None."""
    try:
        extension()
    except ImportError as error:
        return f"the CPU kernels were not built: {error}"
    return None


@cache
def variant() -> Any:
    """The kernels for this processor's best instruction set."""
    return getattr(extension(), extension().usable[0])


def unsupported(*tensors: Any, **options: Any) -> str | None:
    """Why these arguments need the plain form of an operation, or None."""
    first = tensors[0]
    if first.device.type != "cpu":
        return f"a tensor on {first.device.type}"
    if first.dtype not in DTYPES:
        return f"{first.dtype} input"
    return None


def _call(operation: str, dtype: torch.dtype, *arguments: Any) -> None:
    getattr(variant(), f"{operation}_{str(dtype).removeprefix('torch.')}")(*arguments)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _place(tensor: Tensor) -> tuple[int, ...]:
    """Address and strides of a four-dimensional tensor whose last dimension is contiguous."""
    return (tensor.data_ptr(), *tensor.stride()[:3])


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm.rms_norm`."""
    rms_norm_plain.check(x, weight)
    if weight.dtype != x.dtype:
        return rms_norm_plain.rms_norm(x, weight, eps)
    if not torch.is_grad_enabled():
        return _norm(x, None, weight, eps)[1]
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm.add_rms_norm`; both gradients of the sum are added up in fp32."""
    rms_norm_plain.check(x, weight, residual)
    if not x.dtype == residual.dtype == weight.dtype:
        return rms_norm_plain.add_rms_norm(x, residual, weight, eps)
    if not torch.is_grad_enabled():
        return _norm(x, residual, weight, eps)[:2]
    result: tuple[Tensor, Tensor] = _AddRMSNorm.apply(x, residual, weight, eps)
    return result


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x + residual, its norm, 1 / root mean square of every row)"""
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    total = x if residual is None else torch.empty_like(x)
    out, columns = torch.empty_like(x), x.shape[-1]
    rstd_N = torch.empty(x.numel() // max(columns, 1), dtype=torch.float32)
    addresses = map(_address, (x, residual, weight, total, out, rstd_N))
    _call("norm_forward", x.dtype, *addresses, len(rstd_N), columns, eps)
    return total, out, rstd_N


def _norm_gradients(
    x: Tensor, weight: Tensor, rstd_N: Tensor, grad: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(of x, with `grad_total` added; of the weight)"""
    x, grad, weight = x.contiguous(), grad.contiguous(), weight.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x, columns = torch.empty_like(x), x.shape[-1]
    parts_PH = torch.empty((len(rstd_N) + NORM_ROWS - 1) // NORM_ROWS, columns, dtype=torch.float32)
    addresses = map(_address, (x, grad_total, weight, grad, grad_x, rstd_N, parts_PH))
    _call("norm_backward", x.dtype, *addresses, len(rstd_N), columns)
    return grad_x, parts_PH.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, out, rstd_N = _norm(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd_N)  # x as passed in: a view of a projection needs no second copy
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd_N = ctx.saved_tensors
        return *_norm_gradients(x, weight, rstd_N, grad, None), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, out, rstd_N = _norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd_N)
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return grad_total, grad_total, None, None
        total, weight, rstd_N = ctx.saved_tensors
        grad_x, grad_weight = _norm_gradients(total, weight, rstd_N, grad, grad_total)
        return grad_x, grad_x, grad_weight, None


def rope(q_SBHD: Tensor, k_SBKD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rope.rope`."""
    rope_plain.check(q_SBHD, k_SBKD, cos, sin)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    if not torch.is_grad_enabled():
        return _turned(q_SBHD, cos, sin, 1.0), _turned(k_SBKD, cos, sin, 1.0)
    result: tuple[Tensor, Tensor] = _Rotation.apply(q_SBHD, k_SBKD, cos, sin)
    return result


def rope_qkv(
    qkv_SBE: Tensor, cos: Tensor, sin: Tensor, q_heads: int, k_heads: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rope.rope_qkv`; v stays a view."""
    q_SBHD, k_SBKD, v_SBKD = rope_plain.split_qkv(qkv_SBE, q_heads, k_heads, width)
    return *rope(q_SBHD, k_SBKD, cos, sin), v_SBKD


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation, so q and k are not saved."""

    @staticmethod
    def forward(ctx: Any, q_SBHD: Tensor, k_SBKD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turned(q_SBHD, cos, sin, 1.0), _turned(k_SBKD, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_q, cos, sin, -1.0), _turned(grad_k, cos, sin, -1.0), None, None


def _turned(x_SBND: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x_SBND = _last_contiguous(x_SBND)
    out_SBND = torch.empty(x_SBND.shape, dtype=x_SBND.dtype)
    table_step = cos.stride(1) if cos.dim() == 3 else 0
    tables = (_address(cos), _address(sin), cos.stride(0), table_step)
    _call("rotate", x_SBND.dtype, _place(x_SBND), _place(out_SBND), *tables, *x_SBND.shape, cos.shape[-1], sign)
    return out_SBND


def swiglu(gate_up: Tensor) -> Tensor:
    """As `swiglu.swiglu`; only the fused input is saved for backward."""
    swiglu_plain.check(gate_up)
    if not torch.is_grad_enabled():
        return _gated(gate_up.contiguous())
    result: Tensor = _SwiGLU.apply(gate_up)
    return result


def swiglu_again(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """As `swiglu.swiglu_again`."""
    swiglu_plain.check(gate_up)
    gate_up = gate_up.contiguous()
    grad_gate_up = torch.empty_like(gate_up)
    _gate(gate_up, grad.contiguous(), grad_gate_up)
    return _gated(gate_up), grad_gate_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return _gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up)
        _gate(gate_up, grad.contiguous(), grad_gate_up)
        return grad_gate_up


def _gated(gate_up: Tensor) -> Tensor:
    out = torch.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=gate_up.dtype)
    _gate(gate_up, None, out)
    return out


def _gate(gate_up: Tensor, grad: Tensor | None, out: Tensor) -> None:
    features = gate_up.shape[-1] // 2
    rows = gate_up.numel() // max(2 * features, 1)
    _call("swiglu", gate_up.dtype, _address(gate_up), _address(grad), _address(out), rows, features)


def cross_entropy_stats(
    logits_NV: Tensor, targets_N: Tensor, *, vocab_start: int = 0, valid: int | None = None
) -> Tensor:
    """As `cross_entropy.cross_entropy_stats`."""
    valid = cross_entropy_plain.check(logits_NV, targets_N, valid)
    if valid == 0:
        return cross_entropy_plain.cross_entropy_stats(logits_NV, targets_N, vocab_start=vocab_start, valid=valid)
    stats_N3 = torch.empty(logits_NV.shape[0], 3, dtype=torch.float32)
    _cross_entropy(logits_NV, targets_N, stats_N3, None, valid, vocab_start, 0.0, True)
    return stats_N3


def cross_entropy_grad_(
    logits_NV: Tensor,
    targets_N: Tensor,
    stats_N3: Tensor,
    grad_N: Tensor,
    *,
    vocab_start: int = 0,
    valid: int | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """As `cross_entropy.cross_entropy_grad_`."""
    valid = cross_entropy_plain.check(logits_NV, targets_N, valid)
    stats_N3 = stats_N3.float().contiguous()
    _cross_entropy(logits_NV, targets_N, stats_N3, grad_N, valid, vocab_start, z_loss, False)
    return logits_NV


def cross_entropy_stats_grad_(
    logits_NV: Tensor, targets_N: Tensor, grad_N: Tensor, *, valid: int | None = None, z_loss: float = 0.0
) -> Tensor:
    """As `cross_entropy.cross_entropy_stats_grad_`."""
    valid = cross_entropy_plain.check(logits_NV, targets_N, valid)
    stats_N3 = torch.empty(logits_NV.shape[0], 3, dtype=torch.float32)
    _cross_entropy(logits_NV, targets_N, stats_N3, grad_N, valid, 0, z_loss, True)
    return stats_N3


def _cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    stats_N3: Tensor,
    grad_N: Tensor | None,
    valid: int,
    *settings: float,
) -> None:
    targets_N = targets_N.long().contiguous()
    grad_N = None if grad_N is None else grad_N.float().contiguous()
    shape = (logits_NV.stride(0), *logits_NV.shape, valid)
    addresses = (_address(targets_N), _address(stats_N3), _address(grad_N))
    _call("cross_entropy", logits_NV.dtype, _address(logits_NV), *shape, *addresses, *settings)


def attention(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, first_BS: Tensor | None, scale: float) -> Tensor:
    """Causal attention out_SBHD of S queries and S keys, any strides, with a backward that recomputes the scores.

    first_BS, int64 [1 or B, S]: the first key that a query sees, by window and document (without it the very first);
    all up to its own follow.
    """
    result: Tensor = _Attention.apply(q_SBHD, k_SBKD, v_SBKD, first_BS, scale)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, first_BS: Tensor | None, scale: float
    ) -> Tensor:
        q_SBHD, k_SBKD, v_SBKD = map(_last_contiguous, (q_SBHD, k_SBKD, v_SBKD))
        first_BS = None if first_BS is None else first_BS.contiguous()
        out_SBHD, lse_BHS = _attention_forward((q_SBHD, k_SBKD, v_SBKD), (first_BS, None), scale)
        ctx.save_for_backward(q_SBHD, k_SBKD, v_SBKD, out_SBHD, lse_BHS, first_BS)
        ctx.scale = scale
        return out_SBHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBHD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        *tensors, lse_BHS, first_BS = ctx.saved_tensors
        return *_attention_backward((*tensors, grad_SBHD), lse_BHS, (first_BS, None), ctx.scale), None, None


class NativeParts:
    """As `attention.parts.PlainParts`."""

    def forward(
        self, q_SBHD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, seen: Seen, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        if unsupported(q_SBHD) or softcap is not None:
            return PLAIN_PARTS.forward(q_SBHD, k_TBKD, v_TBKD, seen, scale, softcap)
        tensors = tuple(map(_last_contiguous, (q_SBHD, k_TBKD, v_TBKD)))
        return _attention_forward(tensors, (seen.first_BS, seen.last_BS), scale)

    def backward(
        self,
        grad_SBHD: Tensor,
        q_SBHD: Tensor,
        k_TBKD: Tensor,
        v_TBKD: Tensor,
        out_SBHD: Tensor,
        lse_BHS: Tensor,
        seen: Seen,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if unsupported(q_SBHD) or softcap is not None:
            return PLAIN_PARTS.backward(grad_SBHD, q_SBHD, k_TBKD, v_TBKD, out_SBHD, lse_BHS, seen, scale, softcap)
        tensors = tuple(map(_last_contiguous, (q_SBHD, k_TBKD, v_TBKD, out_SBHD)))
        return _attention_backward((*tensors, grad_SBHD), lse_BHS, (seen.first_BS, seen.last_BS), scale)


Table = tuple[Tensor | None, Tensor | None]
"""The first key that each query sees and the one after its last, int64 [1 or B, S], contiguous; None: the very first,
and the one after the query's own."""


def _attention_forward(tensors: tuple[Tensor, ...], table: Table, scale: float) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) from q, k, v."""
    q_SBHD = tensors[0]
    out_SBHD = torch.empty(q_SBHD.shape, dtype=q_SBHD.dtype)
    lse_BHS = torch.empty((*q_SBHD.shape[1:3], len(q_SBHD)), dtype=torch.float32)
    _attend((*tensors, out_SBHD), lse_BHS, table, scale)
    return out_SBHD, lse_BHS


def _attention_backward(
    tensors: tuple[Tensor, ...], lse_BHS: Tensor, table: Table, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v from q, k, v, out and its gradient."""
    grad_q, grad_k, grad_v = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors[:3])
    _attend((*tensors[:4], _last_contiguous(tensors[4]), grad_q, grad_k, grad_v), lse_BHS, table, scale)
    return grad_q, grad_k, grad_v


def _attend(tensors: tuple[Tensor, ...], lse_BHS: Tensor, table: Table, scale: float) -> None:
    """tensors: q, k, v, out, and for the backward also out's gradient and those to be made, of q, k, v."""
    q_SBHD, k_TBKD = tensors[:2]
    places = [*map(_place, tensors), *[NOWHERE] * (8 - len(tensors))]
    first_BS, last_BS = table
    table_row = 0 if first_BS is None or len(first_BS) == 1 else first_BS.stride(0)
    queries, batch, heads, width = q_SBHD.shape
    sizes = (queries, len(k_TBKD), batch, heads, k_TBKD.shape[2], width)
    _call("attention", q_SBHD.dtype, places, *map(_address, (lse_BHS, first_BS, last_BS)), table_row, *sizes, scale)
