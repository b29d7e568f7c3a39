"""Flash attention with specialised warps for Hopper: launch, limits, autograd. Specification: `reference.py`.

Forward in `flash_gluon_kernels.py`, backward in `flash_gluon_backward_kernels.py`: bf16 and fp16, heads of 64, 128 and
256, grouped heads, 64 queries and more, causal or not, windows and documents; no soft cap. Accumulators of dK and dV
do not fit for heads of 256: their backward is Triton's (`flash_triton.py`), which needs the output and the log-sum-exp
alone, as ours does. It can only be imported where Triton has Gluon (3.6).

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import flash_triton
from .flash_gluon_backward_kernels import dkdv_kernel, dq_kernel
from .flash_gluon_kernels import ROWS, forward_kernel

TILES: dict[int, tuple[int, int]] = {64: (128, 3), 128: (128, 2), 256: (64, 2)}
"""Head dim -> (keys of a tile, slots of the ring), from the compiled report; a program has 128 queries."""
BACKWARD_TILES: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {64: ((64, 4), (128, 3)), 128: ((64, 3), (128, 2))}
"""Head dim -> for dK/dV (queries of a tile, slots of the ring), its program has 128 keys; for dQ as `TILES`."""
FEWEST_QUERIES = ROWS.value
ELEMENTS: dict[torch.dtype, Any] = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def shared_layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile [rows, width] lies in shared memory: as the tensor cores read it."""
    return gl.NVMMASharedLayout.get_default_for([rows, width], ELEMENTS[dtype])


def row_length(x_SBHD: Tensor) -> int:
    """Elements from a row's first head to the end of its last one."""
    _, batch, heads, width = x_SBHD.shape
    return (batch - 1) * x_SBHD.stride(1) + (heads - 1) * x_SBHD.stride(2) + width


def _descriptor(x_SBHD: Tensor, rows: int) -> TensorDescriptor:
    """A tensor as a matrix [S, row length]: a tile is `rows` rows of one head, zeros beyond S."""
    shape, width = [len(x_SBHD), row_length(x_SBHD)], x_SBHD.shape[-1]
    layout = shared_layout(rows, width, x_SBHD.dtype)
    return TensorDescriptor(x_SBHD, shape, [x_SBHD.stride(0), 1], [rows, width], layout)


def readable(x_SBHD: Tensor) -> bool:
    """Whether a descriptor can stand for it: aligned to 16 bytes, and one row after the other."""
    step = x_SBHD.stride(0)
    aligned = x_SBHD.data_ptr() % 16 == 0 and step * x_SBHD.element_size() % 16 == 0
    return aligned and x_SBHD.stride(-1) == 1 and min(x_SBHD.stride()) > 0 and step >= row_length(x_SBHD)


def _readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, or copies of those for which no descriptor can stand."""
    return tuple(x if readable(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors)


@torch.library.custom_op("megalite::flash_attention_forward_specialised", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(q, k, v, seen, causal, window, scale)
    q, k, v = _readable(q, k, v)
    queries, batch, heads, width = q.shape
    keys, kv_heads = k.shape[0], k.shape[2]
    block_n, stages = TILES[width]
    rows = ROWS.value
    forward_kernel[(triton.cdiv(queries, 2 * rows), heads, batch)](
        _descriptor(q, rows), _descriptor(k, block_n), _descriptor(v, block_n), _descriptor(out, rows), lse, seen,
        *q.stride()[1:3], *k.stride()[1:3], *v.stride()[1:3],
        queries, keys, heads, heads // kv_heads, window, scale,
        CAUSAL=causal, WINDOW=window > 0, TABLE=seen is not None, STAGES=stages, BLOCK_N=block_n, WIDTH=width,
        num_warps=4,
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    queries, batch, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("megalite::flash_attention_backward_specialised", mutates_args=())
def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Tensor | None,
    seeing: Tensor | None, causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = _backward_fake(dout, dlse, q, k, v, out, lse, seen, seeing, causal, window, scale)
    dout, q, k, v = _readable(dout, q, k, v)
    delta = flash_triton.deltas(out, dout, dlse, lse)
    queries, batch, heads, width = q.shape
    keys, kv_heads = k.shape[0], k.shape[2]
    (block_m, dkdv_stages), (block_n, dq_stages) = BACKWARD_TILES[width]
    rows = ROWS.value
    numbers = (
        *q.stride()[1:3], *k.stride()[1:3], *v.stride()[1:3], *dout.stride()[1:3],
        queries, keys, heads // kv_heads, window, scale,
    )  # fmt: skip
    constants = {"CAUSAL": causal, "WINDOW": window > 0, "TABLE": seen is not None, "WIDTH": width, "num_warps": 4}
    dkdv_kernel[(triton.cdiv(keys, 2 * rows), kv_heads, batch)](
        _descriptor(q, block_m), _descriptor(k, rows), _descriptor(v, rows), _descriptor(dout, block_m),
        _descriptor(dk, rows), _descriptor(dv, rows), lse, delta, seeing, *numbers,
        **constants, STAGES=dkdv_stages, BLOCK_M=block_m,
    )  # fmt: skip
    dq_kernel[(triton.cdiv(queries, 2 * rows), heads, batch)](
        _descriptor(q, rows), _descriptor(k, block_n), _descriptor(v, block_n), _descriptor(dout, rows),
        _descriptor(dq, rows), lse, delta, seen, *numbers,
        **constants, STAGES=dq_stages, BLOCK_N=block_n,
    )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Tensor | None,
    seeing: Tensor | None, causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class Attention(flash_triton.Attention):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Any, seeing: Any, *options: Any) -> Any:
        causal, window, scale, _ = options
        out, lse = _forward(q, k, v, seen, causal, window, scale)
        return flash_triton.keep_for_backward(ctx, (q, k, v, out, lse, seen, seeing), options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if ctx.saved_tensors[0].shape[-1] not in BACKWARD_TILES:
            return flash_triton.gradients(ctx, dout, dlse, flash_triton._backward)
        return flash_triton.gradients(ctx, dout, dlse, lambda *given: _backward(*given[:-1]))  # there is no soft cap


def unsupported(q_SBHD: Tensor, k_SBKD: Tensor, *rest: Any, **options: Any) -> str | None:
    """Why these arguments cannot take this form, or None."""
    width, scale = q_SBHD.shape[-1], options.get("scale")
    if q_SBHD.dtype not in ELEMENTS:
        return f"dtype {q_SBHD.dtype}; it takes bfloat16 and float16"
    if width not in TILES:
        return f"head dim {width}; it takes {', '.join(map(str, TILES))}"
    if options.get("softcap") is not None:
        return "a soft cap of the scores"
    if scale is not None and scale <= 0:
        return f"scale {scale} is not positive"
    if len(q_SBHD) < FEWEST_QUERIES or 0 in (*q_SBHD.shape, *k_SBKD.shape):
        return f"{len(q_SBHD)} queries, {len(k_SBKD)} keys; it takes {FEWEST_QUERIES} queries and a key at least"
    return flash_triton.unsupported(q_SBHD)


def attention(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As `attention_reference`; q, k and v may be views into one fused projection."""
    return flash_triton.attend(Attention, q_SBHD, k_SBKD, v_SBKD, options)
