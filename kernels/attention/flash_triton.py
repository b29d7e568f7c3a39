"""Flash attention in Triton: masks as intervals, tile sizes, launches, autograd. Specification: `reference.py`.

Dao et al. 2022, "FlashAttention", algorithms 1 and 4; Dao 2023, "FlashAttention-2". Flop for S queries and T keys:
forward 4 B H S T D, backward counted as 10 B H S T D (14 are done, see `flash_triton_kernels.py`), half of each
when causal. Memory beyond inputs and output is the log-sum-exp and, in the backward, delta: 8 bytes a query and head.

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from ..layout import next_power_of_two, obstacle
from .flash_triton_kernels import delta_kernel, dkdv_kernel, dq_kernel, forward_kernel
from .parts import PLAIN_PARTS, Seen, seeing_queries
from .reference import document_begins, read_options

WIDEST = 256
GRID_LIMIT = 65535  # programs of a launch along its second and third axis

Tiles = tuple[int, int, int, int]
"""(queries, keys, warps, stages)"""

# Chosen from the compiled report (registers, no stack, shared memory): by block of head dim, for the kinds of device of
# `kind_of_device`, whose products take operands from shared memory, from registers, and from registers with little
# shared memory.
Table = dict[int, tuple[Tiles, Tiles, Tiles]]
FORWARD: Table = {
    16: ((128, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    32: ((128, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    64: ((128, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    128: ((128, 128, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3)),
    256: ((128, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
}
DKDV: Table = {
    16: ((64, 128, 8, 3), (32, 64, 4, 2), (32, 64, 4, 2)),
    32: ((64, 128, 8, 3), (32, 64, 4, 2), (32, 64, 4, 2)),
    64: ((64, 128, 8, 3), (64, 32, 4, 2), (16, 128, 8, 1)),
    128: ((32, 128, 8, 2), (32, 64, 8, 2), (64, 64, 8, 1)),
    256: ((16, 64, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
}
DQ: Table = {
    16: ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    32: ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    64: ((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
    128: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    256: ((64, 64, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
}
HOPPER, AMPERE, SMALL = 0, 1, 2
SHARED_MEMORY = {HOPPER: 232448, AMPERE: 166912, SMALL: 101376}
"""Bytes that a program may have: compute capability 9.0 and 10.x; 8.0; 8.6, 8.9 and 12.x."""
DELTA = (64, 4)
"""(queries, warps) of the backward's preparation, which is bound by memory."""
FP32_TILES: Tiles = (64, 64, 4, 1)
FP32_WIDE_TILES: Tiles = (32, 32, 4, 1)


def tiles(table: Table, width: int, itemsize: int, kind: int) -> Tiles:
    """Tile sizes for heads of `width` elements; fp32 products are for tests and small models, they are not tuned."""
    if itemsize == 4:
        return FP32_TILES if width <= 64 else FP32_WIDE_TILES
    return table[head_block(width)][kind]


def head_block(width: int) -> int:
    return max(16, next_power_of_two(width))


def descriptors_fit(*tensors: Tensor) -> bool:
    """Whether Hopper's tensor memory accelerator can read these: 16-byte aligned starts and strides.

    Compute capability 12.x has one too, but no products from shared memory: tiles read so cost registers (spills)."""
    device = tensors[0].device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0) or kind_of_device(device) != HOPPER:
        return False
    return all(
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 and stride > 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def document_intervals(documents: Tensor, queries: int, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """(seen keys int32 [2, B, S], seeing queries int32 [2, B, T]) for documents int [T, B] (runs of equal numbers)."""
    keys, batch = documents.shape
    position = torch.arange(keys, device=documents.device)[:, None].expand(keys, batch)
    begin = document_begins(documents)
    last = torch.ones(keys, batch, dtype=torch.bool, device=documents.device)
    last[:-1] = begin[1:] != begin[:-1]
    end = (position + 1).where(last, keys).flip(0).cummin(0).values.flip(0)
    here = position[keys - queries :].t()
    return _intervals(here, begin[keys - queries :].t(), end[keys - queries :].t(), keys, causal, window)


def _intervals(
    here: Tensor, begin: Tensor, end: Tensor, keys: int, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """Bounds per query [B, S] from its key position and its document's bounds; then, both bounds being sorted, per
    key."""
    hi = torch.minimum(torch.maximum(here + 1, begin), end) if causal else end
    lo = begin if window is None else torch.minimum(torch.maximum(here - window + 1, begin), end)
    return torch.stack([lo, hi]).int(), seeing_queries(lo, hi, keys)


def _source(x_SBHD: Tensor, rows: int, use_descriptors: bool) -> Any:
    """What a kernel reads tiles of `rows` from: the tensor, or a descriptor of it as [B, H, S, D]."""
    if not use_descriptors:
        return x_SBHD
    view = x_SBHD.permute(1, 2, 0, 3)
    block = [1, 1, rows, head_block(x_SBHD.shape[-1])]
    return TensorDescriptor(x_SBHD, list(view.shape), list(view.stride()), block)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(q: Tensor, causal: bool, window: int, softcap: float, table: Tensor | None, use: bool) -> dict[str, Any]:
    exact = q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return {
        "CAUSAL": causal,
        "WINDOW": window > 0,
        "TABLE": table is not None,
        "SOFTCAP": softcap > 0,
        "DESCRIPTORS": use,
        "PRECISION": "ieee" if exact else "tf32",
        "WIDTH": q.shape[-1],
        "BLOCK_D": head_block(q.shape[-1]),
    }


@lru_cache
def kind_of_device(device: torch.device) -> int:
    """HOPPER, AMPERE or SMALL, by the shared memory that a program may have."""
    if device.type != "cuda":
        return HOPPER
    given = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)  # not on HIP
    return next((kind for kind, needed in SHARED_MEMORY.items() if given >= needed), SMALL)


@torch.library.custom_op("megalite::flash_attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, window: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(q, k, v, seen, causal, window, scale, softcap)
    if out.numel() == 0:
        return out, lse
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    queries, batch, heads, width = q.shape
    keys, kv_heads = k.shape[0], k.shape[2]
    use = keys > 0 and descriptors_fit(q, k, v)
    block_m, block_n, warps, stages = tiles(FORWARD, width, q.element_size(), kind_of_device(q.device))
    forward_kernel[(triton.cdiv(queries, block_m), heads, batch)](
        _source(q, block_m, use), _source(k, block_n, use), _source(v, block_n, use), out, lse, seen,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        queries, keys, heads, heads // kv_heads, window, scale, softcap,
        **_constants(q, causal, window, softcap, seen, use), BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, window: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    queries, batch, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)


def deltas(out: Tensor, dout: Tensor, dlse: Tensor | None, lse: Tensor) -> Tensor:
    """The backward's preparation: what all dS of a row have in common, [B, H, S]."""
    (queries, batch, heads, width), delta = out.shape, torch.empty_like(lse)
    block_m, warps = DELTA
    delta_kernel[(triton.cdiv(queries, block_m), heads, batch)](
        out, dout, dlse, delta, *dout.stride()[:3], queries, heads,
        HAS_DLSE=dlse is not None, BLOCK_M=block_m, WIDTH=width, BLOCK_D=head_block(width), num_warps=warps,
    )  # fmt: skip
    return delta


@torch.library.custom_op("megalite::flash_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Tensor | None,
    seeing: Tensor | None, causal: bool, window: int, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout, q, k, v = (_unit_stride(x) for x in (dout, q, k, v))
    queries, batch, heads, width = q.shape
    keys, kv_heads = k.shape[0], k.shape[2]
    delta = deltas(out, dout, dlse, lse)
    use = descriptors_fit(q, k, v, dout)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    sizes = (queries, keys, heads, heads // kv_heads, window, scale, softcap)
    constants = _constants(q, causal, window, softcap, seen, use)
    block_m, block_n, warps, stages = tiles(DKDV, width, q.element_size(), kind_of_device(q.device))
    dkdv_kernel[(triton.cdiv(keys, block_n), kv_heads, batch)](
        _source(q, block_m, use), _source(k, block_n, use), _source(v, block_n, use), _source(dout, block_m, use),
        lse, delta, dk, dv, seeing, *strides, *sizes, **constants, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_m, block_n, warps, stages = tiles(DQ, width, q.element_size(), kind_of_device(q.device))
    dq_kernel[(triton.cdiv(queries, block_m), heads, batch)](
        _source(q, block_m, use), _source(k, block_n, use), _source(v, block_n, use), _source(dout, block_m, use),
        lse, delta, dq, seen, *strides, *sizes, **constants, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Tensor | None,
    seeing: Tensor | None, causal: bool, window: int, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class Attention(torch.autograd.Function):
    """Tensors, the tables of `document_intervals` or None, causal, window (0: none), scale, softcap (0: none) ->
    output, log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Any, seeing: Any, *options: Any) -> Any:
        out, lse = _forward(q, k, v, seen, *options)
        return keep_for_backward(ctx, (q, k, v, out, lse, seen, seeing), options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        return gradients(ctx, dout, dlse, _backward)


def keep_for_backward(ctx: Any, saved: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """What a forward leaves for `Attention.backward`; returns its output and log-sum-exp."""
    ctx.save_for_backward(*saved)
    ctx.options = options
    ctx.set_materialize_grads(False)
    return saved[3], saved[4]


def gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None, backward: Callable[..., Any]) -> tuple[Any, ...]:
    """What `Attention.backward` returns, by a backward that takes the arguments of `_backward`."""
    q, k, v, out, lse, seen, seeing = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = dlse if dlse is None else dlse.float().contiguous()
    grads = backward(dout, dlse, q, k, v, out, lse, seen, seeing, *ctx.options)
    return (*grads, None, None, None, None, None, None)


def unsupported(q_SBHD: Tensor, *rest: Any, **options: Any) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    if q_SBHD.shape[-1] > WIDEST:
        return f"head dim {q_SBHD.shape[-1]} is above {WIDEST}"
    if q_SBHD.shape[1] > GRID_LIMIT:
        return f"batch {q_SBHD.shape[1]} is above {GRID_LIMIT}, a launch's limit"
    return obstacle(q_SBHD)


def attention(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As `attention_reference`; q, k and v may be views into one fused projection."""
    return attend(Attention, q_SBHD, k_SBKD, v_SBKD, options)


def attend(
    function: type[Attention], q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, options: dict[str, Any]
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` by one of the functions that keep what `Attention.backward` needs."""
    asked = read_options(q_SBHD, k_SBKD, v_SBKD, options)
    queries, causal, window, documents = len(q_SBHD), asked.causal, asked.window, asked.packed
    seen, seeing = None, None
    if documents is not None:
        seen, seeing = documents.once(
            ("intervals", queries, causal, window),
            lambda numbers_TB: document_intervals(numbers_TB, queries, causal, window),
        )
    scale, softcap = asked.scale_for(q_SBHD), asked.softcap or 0.0
    pair = function.apply(q_SBHD, k_SBKD, v_SBKD, seen, seeing, causal, window or 0, scale, softcap)
    return pair if asked.return_lse else pair[0]


def _for_batch(table: Tensor, q_SBHD: Tensor) -> Tensor:
    """A table of `Seen` with a row for each sequence of the batch."""
    return table.expand(2, q_SBHD.shape[1], -1).contiguous()


class FlashParts:
    """As `parts.PlainParts`: the same kernels by the tables of `Seen`."""

    def forward(
        self, q_SBHD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, seen: Seen, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        if unsupported(q_SBHD):
            return PLAIN_PARTS.forward(q_SBHD, k_TBKD, v_TBKD, seen, scale, softcap)
        table = _for_batch(seen.seen_2BS, q_SBHD)
        out, lse = _forward(q_SBHD, k_TBKD, v_TBKD, table, False, 0, scale, softcap or 0.0)
        return out, lse

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
        if unsupported(q_SBHD):
            return PLAIN_PARTS.backward(grad_SBHD, q_SBHD, k_TBKD, v_TBKD, out_SBHD, lse_BHS, seen, scale, softcap)
        tables = (_for_batch(seen.seen_2BS, q_SBHD), _for_batch(seen.seeing_2BT, q_SBHD))
        given = (grad_SBHD, None, q_SBHD, k_TBKD, v_TBKD, out_SBHD, lse_BHS)
        grad_q, grad_k, grad_v = _backward(*given, *tables, False, 0, scale, softcap or 0.0)
        return grad_q, grad_k, grad_v
