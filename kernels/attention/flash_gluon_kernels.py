"""Flash attention's forward for Hopper with specialised warps, in Gluon, Triton's lower level. Launched by
`flash_gluon.py`; compiled only for compute capability 9.0.

Shah et al. 2024, "FlashAttention-3": one warp does nothing but ask the tensor memory accelerator for tiles of keys and
values; two groups of four warps consume them, each with 64 queries of its own. A consumer issues the scores of the next
tile before the product of the last one's probabilities with its values, and computes the next softmax while that
product runs. Masks and arithmetic are those of `flash_triton_kernels.py`, written again in Gluon's operations, since
the functions there are made of Triton's.

Barriers: one per slot of the ring that says "filled" (the accelerator arrives, with the number of bytes) and one that
says "free" (both consumers arrive). Turn n of a slot waits for the barrier's phase n % 2; a free slot's first turn
waits for the phase before the first, which a new barrier has passed already.

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim; M = 64 queries and N keys of a tile.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)  # consumers
ROWS = gl.constexpr(64)  # queries of a consumer: what one group of four warps multiplies at once


@gluon.jit
def seen_keys(i, table, batch, batches, queries, keys, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
               TABLE: gl.constexpr):  # fmt: skip
    """[lo, hi) of the keys that query i sees; table: int32 [2, B, S]."""
    if TABLE:
        at = table + batch.to(gl.int64) * queries + i
        lo = gl.load(at, mask=i < queries, other=0)
        hi = gl.load(at + batches.to(gl.int64) * queries, mask=i < queries, other=0)
    else:
        here = i + (keys - queries)
        lo = i * 0
        hi = lo + keys
        if CAUSAL:
            hi = gl.minimum(gl.maximum(here + 1, 0), keys)
        if WINDOW:
            lo = gl.minimum(gl.maximum(here - window + 1, 0), keys)
    return lo, hi


@gluon.jit
def _load(k, v, filled, free, k_tiles, v_tiles, k_column, v_column, begin, turns, STAGES: gl.constexpr,
          BLOCK_N: gl.constexpr):  # fmt: skip
    """The producer: keys and values of every turn, each as soon as both consumers have left its slot."""
    for turn in range(turns):
        slot = turn % STAGES
        phase = (turn // STAGES) & 1
        row = begin + turn * BLOCK_N
        mbarrier.wait(free.index(slot), phase ^ 1)
        mbarrier.expect(filled.index(slot), k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [row, k_column], filled.index(slot), k_tiles.index(slot))
        mbarrier.wait(free.index(STAGES + slot), phase ^ 1)
        mbarrier.expect(filled.index(STAGES + slot), v.block_type.nbytes)
        tma.async_copy_global_to_shared(v, [row, v_column], filled.index(STAGES + slot), v_tiles.index(slot))


@gluon.jit
def _softmax(s_MN, lo, hi, key, largest, total, factor, MASKED: gl.constexpr):
    """One tile's probabilities in base 2, and what earlier ones must shrink by."""
    if MASKED:
        seen = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        s_MN = gl.where(seen, s_MN, float("-inf"))
    new = gl.maximum(largest, gl.max(s_MN, 1))
    base = new * factor
    if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
        base = gl.where(new == float("-inf"), 0.0, base)
    p_MN = gl.exp2(s_MN * factor - base[:, None])
    shrink = gl.exp2(largest * factor - base)
    return p_MN, new, total * shrink + gl.sum(p_MN, 1), shrink


@gluon.jit
def _span(acc, total, largest, p, lo, hi, q_tile, k_tiles, v_tiles, filled, free, begin, turn, stop, factor,
          MASKED: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr,
          SCORES: gl.constexpr, OUT: gl.constexpr, PROBABILITIES: gl.constexpr):  # fmt: skip
    """Turns [turn, stop): scores and softmax of each, while the turn before meets its values."""
    for n in range(turn, stop):
        slot = n % STAGES
        mbarrier.wait(filled.index(slot), (n // STAGES) & 1)
        s_MN = warpgroup_mma(q_tile, k_tiles.index(slot).permute((1, 0)),
                             gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES), use_acc=False, is_async=True)  # fmt: skip
        last = (n - 1) % STAGES
        mbarrier.wait(filled.index(STAGES + last), ((n - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_tiles.index(last), acc, is_async=True)
        s_MN = warpgroup_mma_wait(1, deps=[s_MN])
        mbarrier.arrive(free.index(slot))
        key = begin + n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        p_MN, largest, total, shrink = _softmax(s_MN, lo, hi, key, largest, total, factor, MASKED)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(STAGES + last))
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
        p = gl.convert_layout(p_MN.to(p.dtype), PROBABILITIES)
    return acc, total, largest, p


@gluon.jit
def _consume(q, out, table, lse_ptr, q_tiles, k_tiles, v_tiles, q_filled, filled, free, tile, batch, head, batches,
             heads, out_column, queries, keys, window, begin, turns, whole_from, whole_to, factor, PART: gl.constexpr,
             CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TABLE: gl.constexpr, STAGES: gl.constexpr,
             BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):  # fmt: skip
    """One consumer: the PART-th 64 queries of the tile, from the first turn to the stored output."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    start = tile * (2 * ROWS) + PART * ROWS
    i = start + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    lo, hi = seen_keys(i, table, batch, batches, queries, keys, window, CAUSAL, WINDOW, TABLE)
    q_tile = q_tiles.index(PART)
    mbarrier.wait(q_filled, 0)
    mbarrier.wait(filled.index(0), 0)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    s_MN = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s_MN = warpgroup_mma_wait(0, deps=[s_MN])
    mbarrier.arrive(free.index(0))
    largest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    key = begin + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    p_MN, largest, total, _ = _softmax(s_MN, lo, hi, key, largest, total, factor, True)
    p = gl.convert_layout(p_MN.to(q.dtype), PROBABILITIES)
    acc = gl.zeros([ROWS, WIDTH], gl.float32, OUT)
    if WINDOW or TABLE:
        acc, total, largest, p = _span(acc, total, largest, p, lo, hi, q_tile, k_tiles, v_tiles, filled, free, begin, 1,
                                       whole_from, factor, True, STAGES, BLOCK_N, WIDTH, SCORES, OUT,
                                   PROBABILITIES)  # fmt: skip
    acc, total, largest, p = _span(acc, total, largest, p, lo, hi, q_tile, k_tiles, v_tiles, filled, free, begin,
                                   whole_from, whole_to, factor, False, STAGES, BLOCK_N, WIDTH, SCORES,
                                   OUT, PROBABILITIES)  # fmt: skip
    acc, total, largest, p = _span(acc, total, largest, p, lo, hi, q_tile, k_tiles, v_tiles, filled, free, begin,
                                   whole_to, turns, factor, True, STAGES, BLOCK_N, WIDTH, SCORES, OUT,
                                   PROBABILITIES)  # fmt: skip
    last = (turns - 1) % STAGES
    mbarrier.wait(filled.index(STAGES + last), ((turns - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    seen = total > 0
    safe_total = gl.where(seen, total, 1.0)
    acc = acc / gl.convert_layout(safe_total, gl.SliceLayout(1, OUT))[:, None]
    q_tile.store(acc.to(q.dtype))  # this consumer's queries are not read any more
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [start, out_column], q_tile)
    lse = gl.where(seen, (largest * factor + gl.log2(safe_total)) / LOG2E, float("-inf"))
    gl.store(lse_ptr + (batch * heads + head).to(gl.int64) * queries + i, lse, mask=i < queries)
    tma.store_wait(0)


@gluon.jit
def forward_kernel(
    q, k, v, out, lse_ptr, table, q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h,
    queries, keys, heads, group, window, scale,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TABLE: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    tile = gl.num_programs(0) - 1 - gl.program_id(0)  # the longest causal rows first, so that no one waits for them
    head, batch, batches = gl.program_id(1), gl.program_id(2), gl.num_programs(2)
    kv_head = head // group
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    i = tile * (2 * ROWS) + gl.arange(0, 2 * ROWS, LINE)
    lo, hi = seen_keys(i, table, batch, batches, queries, keys, window, CAUSAL, WINDOW, TABLE)
    inside = i < queries
    begin = gl.min(gl.where(inside, lo, keys), 0) // BLOCK_N * BLOCK_N
    end = gl.maximum(gl.max(gl.where(inside, hi, 0), 0), begin + 1)  # a tile that sees nothing takes one masked turn
    turns = (end - begin + BLOCK_N - 1) // BLOCK_N
    # Turns from `whole_from` to `whole_to` are seen whole by all queries of the tile; the first is masked anyhow.
    whole_from = (gl.max(gl.where(inside, lo, 0), 0) - begin + BLOCK_N - 1) // BLOCK_N
    whole_from = gl.minimum(gl.maximum(whole_from, 1), turns)
    whole_to = gl.maximum((gl.min(gl.where(inside, hi, keys), 0) - begin) // BLOCK_N, whole_from)
    whole_to = gl.minimum(whole_to, turns)

    q_tiles = gl.allocate_shared_memory(q.dtype, [2, ROWS, WIDTH], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, WIDTH], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, BLOCK_N, WIDTH], v.layout)
    q_filled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    filled = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_filled, count=1)
    for slot in gl.static_range(2 * STAGES):
        mbarrier.init(filled.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    fence_async_shared()
    mbarrier.expect(q_filled, 2 * q.block_type.nbytes)
    for part in gl.static_range(2):
        row, column = tile * (2 * ROWS) + part * ROWS, batch * q_stride_b + head * q_stride_h
        tma.async_copy_global_to_shared(q, [row, column], q_filled, q_tiles.index(part))
    factor = scale * LOG2E
    out_column = (batch * heads + head) * WIDTH
    k_column, v_column = batch * k_stride_b + kv_head * k_stride_h, batch * v_stride_b + kv_head * v_stride_h
    gl.warp_specialize(
        [
            (
                _consume,
                (q, out, table, lse_ptr, q_tiles, k_tiles, v_tiles, q_filled, filled, free, tile, batch, head, batches,
                 heads, out_column, queries, keys, window, begin, turns, whole_from, whole_to, factor, FIRST, CAUSAL,
                 WINDOW, TABLE, STAGES, BLOCK_N, WIDTH),
            ),
            (
                _consume,
                (q, out, table, lse_ptr, q_tiles, k_tiles, v_tiles, q_filled, filled, free, tile, batch, head, batches,
                 heads, out_column, queries, keys, window, begin, turns, whole_from, whole_to, factor, SECOND, CAUSAL,
                 WINDOW, TABLE, STAGES, BLOCK_N, WIDTH),
            ),
            (_load, (k, v, filled, free, k_tiles, v_tiles, k_column, v_column, begin, turns, STAGES, BLOCK_N)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
