"""`decode.py` in Triton: every row's keys are split over programs, whose parts are then put together.

Dao et al. 2023, "Flash-Decoding for long-context inference". One query would keep a program a head busy, far fewer than
a GPU has room for, and the cache is read at the speed of those few. So a launch has as many parts a row as the device
has room for by rows, heads and capacity, numbers that a graph may keep; how many keys a part takes follows from the
count in memory, and parts beyond it have nothing to do. The query heads that share a kv head are the rows of one
product (at least 16 of them, the smallest that tensor cores take), so that a key is read once.

Bytes: each key and value that is seen once; for several parts also 8 (D + 1) a part and query head. Nothing beyond a
row's own places is loaded.

Shapes: C places, B rows, H query heads, K kv heads, D head dim, G = H / K, P parts; N keys of a tile.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import next_power_of_two, obstacle, program_count, warps_for
from .decode import Filled, check
from .flash_triton import GRID_LIMIT, WIDEST, head_block
from .flash_triton_kernels import LOG2E

LEAST_ROWS, MOST_ROWS = 16, 64  # of a product: tensor cores take no fewer, registers hold no more
MOST_PARTS = 64
TILE_BYTES, MOST_KEYS = 1 << 14, 128
"""Bytes of a tile of keys and of one of values, and keys of a tile at most: two stages of both fit every device."""
WARPS, STAGES = 4, 2


def tile_keys(width: int, itemsize: int) -> int:
    """Keys of a tile."""
    return min(MOST_KEYS, TILE_BYTES // (head_block(width) * itemsize))


def parts(capacity: int, programs: int, room: int, width: int, itemsize: int) -> int:
    """Into how many parts the keys of each of `programs` rows and heads are split, a power of two: until the device
    has `room` programs, each with a tile at least if the buffer is full."""
    wanted = min(room // max(programs, 1), capacity // tile_keys(width, itemsize), MOST_PARTS)
    return next_power_of_two(wanted + 1) // 2 if wanted > 1 else 1


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, count_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, k_stride_s, k_stride_b, k_stride_h, v_stride_s, v_stride_b, v_stride_h,
    group, window, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One part of a row's keys: its output [B, K, P, G, D], normalised, and base-2 log-sum-exp [B, K, P, G]."""
    part, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    every, kv_heads = tl.num_programs(0), tl.num_programs(1)
    count = tl.load(count_ptr).to(tl.int32)
    first = tl.load(first_ptr + batch).to(tl.int32)
    if WINDOW:
        first = tl.maximum(first, count - window)
    each = tl.cdiv(tl.cdiv(tl.maximum(count - first, 0), every), BLOCK_N) * BLOCK_N
    start = first + part * each
    stop = tl.minimum(start + each, count)
    member = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_D)
    inside = column < WIDTH
    head = (kv_head * group + member).to(tl.int64)
    q_at = q_ptr + batch.to(tl.int64) * q_stride_b + head[:, None] * q_stride_h + column[None, :]
    q_GD = tl.load(q_at, mask=(member < group)[:, None] & inside[None, :], other=0.0)
    k_row = k_ptr + batch.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_row = v_ptr + batch.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for j in range(start, stop, BLOCK_N):
        key = j + tl.arange(0, BLOCK_N)
        known = key < stop
        loaded = known[:, None] & inside[None, :]
        k_ND = tl.load(k_row + key.to(tl.int64)[:, None] * k_stride_s + column[None, :], mask=loaded, other=0.0)
        s_GN = tl.dot(q_GD, tl.trans(k_ND), input_precision=PRECISION)
        if SOFTCAP:
            s_GN = (2 * tl.sigmoid(s_GN * (2 * scale / softcap)) - 1) * (softcap * LOG2E)  # tanh
        else:
            s_GN = s_GN * (scale * LOG2E)
        s_GN = tl.where(known[None, :], s_GN, float("-inf"))  # every tile has a known key
        new = tl.maximum(largest, tl.max(s_GN, 1))
        p_GN = tl.exp2(s_GN - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p_GN, 1)
        v_ND = tl.load(v_row + key.to(tl.int64)[:, None] * v_stride_s + column[None, :], mask=loaded, other=0.0)
        acc = tl.dot(p_GN.to(v_ND.dtype), v_ND, acc * shrink[:, None], input_precision=PRECISION)
        largest = new
    seen = start < stop
    total = tl.where(seen, total, 1.0)
    at = ((batch.to(tl.int64) * kv_heads + kv_head) * every + part) * group + member
    out_GD = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    stored = (member < group)[:, None] & inside[None, :]
    tl.store(out_ptr + at[:, None] * WIDTH + column[None, :], out_GD, mask=stored)
    tl.store(lse_ptr + at, tl.where(seen, largest + tl.log2(total), float("-inf")), mask=member < group)


@triton.jit
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, group,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The parts [B, K, P, G, D] of one query head, weighted by their shares of the sum of exponentials."""
    head, batch, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    kv_head, kv_heads = head // group, heads // group
    column = tl.arange(0, BLOCK_D)
    inside = column < WIDTH
    here = (batch.to(tl.int64) * kv_heads + kv_head) * PARTS + tl.arange(0, PARTS)
    at = here * group + head % group
    lse = tl.load(lse_ptr + at)
    top = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(share, 0)
    loaded = (lse != float("-inf"))[:, None] & inside[None, :]  # NaN is loaded, too
    part_PD = tl.load(part_ptr + at[:, None] * WIDTH + column[None, :], mask=loaded, other=0.0)
    out = tl.sum(part_PD * share[:, None], 0) / tl.where(total == 0, 1.0, total)
    out_at = out_ptr + (batch.to(tl.int64) * heads + head) * WIDTH + column
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("megalite::decode_attention", mutates_args=())
def _decode(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, count: Tensor, window: int, scale: float, softcap: float
) -> Tensor:
    out = _decode_fake(q, k, v, first, count, window, scale, softcap)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (_, batch, heads, width), (capacity, _, kv_heads, _) = q.shape, k.shape
    group, itemsize = heads // kv_heads, q.element_size()
    many = parts(capacity, batch * kv_heads, program_count(q.device), width, itemsize)
    lse = q.new_empty(batch * heads * many, dtype=torch.float32)
    part = out if many == 1 else q.new_empty(batch * heads * many * width, dtype=torch.float32)
    exact = q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    decode_kernel[(many, kv_heads, batch)](
        q, k, v, first.contiguous(), count, part, lse, *q.stride()[1:3], *k.stride()[:3], *v.stride()[:3],
        group, window, scale, softcap,
        WINDOW=window > 0, SOFTCAP=softcap > 0, PRECISION="ieee" if exact else "tf32",
        BLOCK_G=max(LEAST_ROWS, next_power_of_two(group)), BLOCK_N=tile_keys(width, itemsize), WIDTH=width,
        BLOCK_D=head_block(width), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if many > 1:
        combine_kernel[(heads, batch)](
            part, lse, out, group, PARTS=many, WIDTH=width, BLOCK_D=head_block(width),
            num_warps=warps_for(many * head_block(width)),
        )  # fmt: skip
    return out


@_decode.register_fake
def _decode_fake(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, count: Tensor, window: int, scale: float, softcap: float
) -> Tensor:
    return q.new_empty(q.shape)


def unsupported(q_1BHD: Tensor, k_CBKD: Tensor, v_CBKV: Tensor, *rest: object, **options: object) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    if k_CBKD.shape[-1] != v_CBKV.shape[-1]:
        return f"values of {v_CBKV.shape[-1]} beside keys of {k_CBKD.shape[-1]}"
    if q_1BHD.shape[-1] > WIDEST:
        return f"head dim {q_1BHD.shape[-1]} is above {WIDEST}"
    if q_1BHD.shape[1] > GRID_LIMIT:
        return f"batch {q_1BHD.shape[1]} is above {GRID_LIMIT}, a launch's limit"
    if q_1BHD.shape[2] // k_CBKD.shape[2] > MOST_ROWS:
        return f"{q_1BHD.shape[2] // k_CBKD.shape[2]} query heads of one kv head are more than {MOST_ROWS}"
    return obstacle(q_1BHD)


def decode_attention(
    q_1BHD: Tensor,
    k_CBKD: Tensor,
    v_CBKD: Tensor,
    filled: Filled,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `decode.decode_attention`."""
    check(q_1BHD, k_CBKD, v_CBKD, filled)
    factor = q_1BHD.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _decode(q_1BHD, k_CBKD, v_CBKD, *filled, window or 0, factor, softcap or 0.0)
    return out
