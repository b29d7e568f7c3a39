"""Flash attention's backward for Hopper with specialised warps, in Gluon: gradients of keys and values, and of queries.
Launched by `flash_gluon.py`; compiled only for compute capability 9.0.

Shah et al. 2024, "FlashAttention-3": one warp asks the tensor memory accelerator for tiles and stores the results, two
groups of four warps compute. There one kernel makes all three gradients, and its programs add theirs of the queries to
memory in the order in which they come. The same bits every time are promised here, so, as in
`flash_triton_kernels.py`, no two programs write one gradient: the backward is two kernels, which both recompute the
scores, 7 products instead of 5. The query heads of a group are walked inside one dK/dV program.

A consumer owns 64 rows. For dK/dV these are keys, with S^T = K Q^T and dP^T = V dO^T; for dQ queries, with S = Q K^T
and dP = dO V^T. Probabilities and their gradients so come out of a product in the registers from which the next one
takes its first factor: they never go through shared memory. The exponentials are taken while dP is computed, dS while
dV is; the other consumer's products fill what remains.

Both accumulators of dK/dV fill 128 of a thread's 240 registers with heads of 128, so few may be left for anything else:
the mask comes before the exponential, bounds of keys and the log-sum-exps and deltas of the queries lie in shared
memory, and the producer stores what the consumers leave there. Heads of 256 do not fit.

Barriers: one for the rows that a program keeps, one for each consumer's results, and for each slot of the ring one that
says "filled" and one that says "free". Phases are counted as in the forward.

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim; M queries and N keys of a tile, 64 of them
where they are the consumer's own.
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

from .flash_gluon_kernels import FIRST, LOG2E, ROWS, SECOND, seen_keys

LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # numbers one after the other in shared memory


@gluon.jit
def _seeing_queries(j, table, batch, batches, queries, keys, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
                    TABLE: gl.constexpr):  # fmt: skip
    """[lo, hi) of the queries that see key j; table: int32 [2, B, T]."""
    if TABLE:
        at = table + batch.to(gl.int64) * keys + j
        lo = gl.load(at, mask=j < keys, other=0)
        hi = gl.load(at + batches.to(gl.int64) * keys, mask=j < keys, other=0)
    else:
        here = j - (keys - queries)
        lo = j * 0
        hi = lo + queries
        if CAUSAL:
            lo = gl.minimum(gl.maximum(here, 0), queries)
        if WINDOW:
            hi = gl.minimum(gl.maximum(here + window, 0), queries)
    return lo, hi


@gluon.jit
def _walk(lo, hi, inside, limit, STEP: gl.constexpr):
    """Where a tile's walk begins and its turns of STEP; those of [whole_from, whole_to) need no mask."""
    begin = gl.min(gl.where(inside, lo, limit), 0) // STEP * STEP
    end = gl.maximum(gl.max(gl.where(inside, hi, 0), 0), begin)
    whole_from = (gl.max(gl.where(inside, lo, 0), 0) - begin + STEP - 1) // STEP
    whole_to = (gl.min(gl.where(inside, hi, limit), 0) - begin) // STEP
    return begin, (end - begin + STEP - 1) // STEP, whole_from, whole_to


@gluon.jit
def _in_base_2(lse):
    """So that the exponential gives 0 for a row that sees no key, as for one that does not exist (+inf)."""
    return gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@gluon.jit
def _barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """(own rows are there, a consumer's results are, a slot is filled, a slot is free)"""
    own = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own, count=1)
    for part in gl.static_range(2):
        mbarrier.init(done.index(part), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(filled.index(slot), count=ARRIVALS)
        mbarrier.init(free.index(slot), count=2)
    fence_async_shared()
    return own, done, filled, free


@gluon.jit
def _load_own(a, b, a_tiles, b_tiles, row, a_column, b_column, own):
    """The rows that a program keeps: both consumers' parts of two matrices."""
    mbarrier.expect(own, 2 * (a.block_type.nbytes + b.block_type.nbytes))
    for part in gl.static_range(2):
        tma.async_copy_global_to_shared(a, [row + part * ROWS, a_column], own, a_tiles.index(part))
        tma.async_copy_global_to_shared(b, [row + part * ROWS, b_column], own, b_tiles.index(part))


@gluon.jit
def _feed_queries(q, k, v, dout, dk, dv, lse_ptr, delta_ptr, q_tiles, k_tiles, v_tiles, do_tiles, numbers, own, done,
                  filled, free, row, at, q_column, k_column, v_column, do_column, out_column, q_stride_h, do_stride_h,
                  queries, group, begin, turns, STAGES: gl.constexpr, BLOCK_M: gl.constexpr):  # fmt: skip
    """The producer of dK/dV: own keys and values, then queries with what belongs to them, one head of the group after
    the other; at last it stores the results."""
    LANES: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    _load_own(k, v, k_tiles, v_tiles, row, k_column, v_column, own)
    for n in range(turns * group):
        slot = n % STAGES
        member = n // turns
        start = begin + (n - member * turns) * BLOCK_M
        mbarrier.wait(free.index(slot), ((n // STAGES) & 1) ^ 1)
        mbarrier.expect(filled.index(slot), q.block_type.nbytes + dout.block_type.nbytes)
        tma.async_copy_global_to_shared(q, [start, q_column + member * q_stride_h], filled.index(slot),
                                        q_tiles.index(slot))  # fmt: skip
        tma.async_copy_global_to_shared(dout, [start, do_column + member * do_stride_h], filled.index(slot),
                                        do_tiles.index(slot))  # fmt: skip
        i = start + gl.arange(0, BLOCK_M, LANES)
        here = at + member * queries + i
        lse = gl.load(lse_ptr + here, mask=i < queries, other=float("inf"))
        numbers.index(slot).store(_in_base_2(lse))
        numbers.index(STAGES + slot).store(gl.load(delta_ptr + here, mask=i < queries, other=0.0))
        mbarrier.arrive(filled.index(slot))
    for part in gl.static_range(2):
        mbarrier.wait(done.index(part), 0)
        tma.async_copy_shared_to_global(dk, [row + part * ROWS, out_column], k_tiles.index(part))
        tma.async_copy_shared_to_global(dv, [row + part * ROWS, out_column], v_tiles.index(part))
    tma.store_wait(0)


@gluon.jit
def _consume_queries(q_tiles, k_tiles, v_tiles, do_tiles, numbers, bounds, own, done, filled, free, group, turns,
                     whole_from, whole_to, scale, PART: gl.constexpr, STAGES: gl.constexpr,
                     BLOCK_M: gl.constexpr, WIDTH: gl.constexpr):  # fmt: skip
    """One consumer of dK/dV: the PART-th 64 keys of the tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    KEYS: gl.constexpr = gl.SliceLayout(1, SCORES)
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    k_tile, v_tile = k_tiles.index(PART), v_tiles.index(PART)
    in_base_2 = scale * LOG2E
    dk_ND = gl.zeros([ROWS, WIDTH], gl.float32, OUT)
    dv_ND = gl.zeros([ROWS, WIDTH], gl.float32, OUT)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, SCORES)
    mbarrier.wait(own, 0)
    for n in range(turns * group):
        slot = n % STAGES
        turn = n % turns
        q_tile, do_tile = q_tiles.index(slot), do_tiles.index(slot)
        mbarrier.wait(filled.index(slot), (n // STAGES) & 1)
        s_NM = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp_NM = warpgroup_mma(v_tile, do_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s_NM = warpgroup_mma_wait(1, deps=[s_NM])
        if (turn < whole_from) | (turn >= whole_to):
            lo = bounds.index(0).slice(PART * ROWS, ROWS).load(KEYS)
            hi = bounds.index(1).slice(PART * ROWS, ROWS).load(KEYS)
            i = turn * BLOCK_M + gl.arange(0, BLOCK_M, QUERIES)
            s_NM = gl.where((i[None, :] >= lo[:, None]) & (i[None, :] < hi[:, None]), s_NM, float("-inf"))
        p_NM = gl.exp2(s_NM * in_base_2 - numbers.index(slot).load(QUERIES)[None, :])
        p = gl.convert_layout(p_NM.to(k_tile.dtype), FACTOR)
        dv_ND = warpgroup_mma(p, do_tile, dv_ND, is_async=True)
        delta = numbers.index(STAGES + slot).load(QUERIES)
        dp_NM = warpgroup_mma_wait(1, deps=[dp_NM])
        ds = gl.convert_layout((p_NM * (dp_NM - delta[None, :])).to(k_tile.dtype), FACTOR)
        dk_ND = warpgroup_mma(ds, q_tile, dk_ND, is_async=True)
        dv_ND, dk_ND = warpgroup_mma_wait(0, deps=[dv_ND, dk_ND])
        mbarrier.arrive(free.index(slot))
    k_tile.store((dk_ND * scale).to(k_tile.dtype))  # this consumer's keys and values are not read any more
    v_tile.store(dv_ND.to(k_tile.dtype))
    fence_async_shared()
    mbarrier.arrive(done.index(PART))


@gluon.jit
def dkdv_kernel(
    q, k, v, dout, dk, dv, lse_ptr, delta_ptr, table, q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b,
    v_stride_h, dout_stride_b, dout_stride_h, queries, keys, group, window, scale,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TABLE: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    tile, kv_head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)  # the first keys have most queries
    kv_heads, batches = gl.num_programs(1), gl.num_programs(2)
    row = tile * (2 * ROWS)
    j = row + gl.arange(0, 2 * ROWS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    lo, hi = _seeing_queries(j, table, batch, batches, queries, keys, window, CAUSAL, WINDOW, TABLE)
    begin, turns, whole_from, whole_to = _walk(lo, hi, j < keys, queries, BLOCK_M)
    q_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, WIDTH], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [2, ROWS, WIDTH], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [2, ROWS, WIDTH], v.layout)
    do_tiles = gl.allocate_shared_memory(dout.dtype, [STAGES, BLOCK_M, WIDTH], dout.layout)
    numbers = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK_M], LINE)
    bounds = gl.allocate_shared_memory(gl.int32, [2, 2 * ROWS], LINE)
    bounds.index(0).store(lo - begin)
    bounds.index(1).store(hi - begin)
    own, done, filled, free = _barriers(STAGES, 2)
    head = kv_head * group
    at = ((batch * kv_heads + kv_head) * group).to(gl.int64) * queries
    q_column, k_column = batch * q_stride_b + head * q_stride_h, batch * k_stride_b + kv_head * k_stride_h
    v_column, do_column = batch * v_stride_b + kv_head * v_stride_h, batch * dout_stride_b + head * dout_stride_h
    out_column = (batch * kv_heads + kv_head) * WIDTH
    gl.warp_specialize(
        [
            (
                _consume_queries,
                (q_tiles, k_tiles, v_tiles, do_tiles, numbers, bounds, own, done, filled, free, group, turns,
                 whole_from, whole_to, scale, FIRST, STAGES, BLOCK_M, WIDTH),
            ),
            (
                _consume_queries,
                (q_tiles, k_tiles, v_tiles, do_tiles, numbers, bounds, own, done, filled, free, group, turns,
                 whole_from, whole_to, scale, SECOND, STAGES, BLOCK_M, WIDTH),
            ),
            (
                _feed_queries,
                (q, k, v, dout, dk, dv, lse_ptr, delta_ptr, q_tiles, k_tiles, v_tiles, do_tiles, numbers, own, done,
                 filled, free, row, at, q_column, k_column, v_column, do_column, out_column, q_stride_h, dout_stride_h,
                 queries, group, begin, turns, STAGES, BLOCK_M),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _feed_keys(q, k, v, dout, dq, q_tiles, k_tiles, v_tiles, do_tiles, own, done, filled, free, row, q_column, k_column,
               v_column, do_column, out_column, begin, turns, STAGES: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """The producer of dQ: own queries and their outputs' gradients, then keys and values; it stores the results."""
    _load_own(q, dout, q_tiles, do_tiles, row, q_column, do_column, own)
    for n in range(turns):
        slot = n % STAGES
        mbarrier.wait(free.index(slot), ((n // STAGES) & 1) ^ 1)
        mbarrier.expect(filled.index(slot), k.block_type.nbytes + v.block_type.nbytes)
        start = begin + n * BLOCK_N
        tma.async_copy_global_to_shared(k, [start, k_column], filled.index(slot), k_tiles.index(slot))
        tma.async_copy_global_to_shared(v, [start, v_column], filled.index(slot), v_tiles.index(slot))
    for part in gl.static_range(2):
        mbarrier.wait(done.index(part), 0)
        tma.async_copy_shared_to_global(dq, [row + part * ROWS, out_column], q_tiles.index(part))
    tma.store_wait(0)


@gluon.jit
def _consume_keys(lse_ptr, delta_ptr, table, q_tiles, k_tiles, v_tiles, do_tiles, own, done, filled, free, row, at,
                  batch, batches, queries, keys, window, begin, turns, whole_from, whole_to, scale, PART: gl.constexpr,
                  CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TABLE: gl.constexpr,
                  STAGES: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):  # fmt: skip
    """One consumer of dQ: the PART-th 64 queries of the tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    i = row + PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    lo, hi = seen_keys(i, table, batch, batches, queries, keys, window, CAUSAL, WINDOW, TABLE)
    lse = _in_base_2(gl.load(lse_ptr + at + i, mask=i < queries, other=float("inf")))
    delta = gl.load(delta_ptr + at + i, mask=i < queries, other=0.0)
    q_tile, do_tile = q_tiles.index(PART), do_tiles.index(PART)
    in_base_2 = scale * LOG2E
    dq_MD = gl.zeros([ROWS, WIDTH], gl.float32, OUT)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    mbarrier.wait(own, 0)
    for n in range(turns):
        slot = n % STAGES
        k_tile = k_tiles.index(slot)
        mbarrier.wait(filled.index(slot), (n // STAGES) & 1)
        s_MN = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp_MN = warpgroup_mma(do_tile, v_tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s_MN = warpgroup_mma_wait(1, deps=[s_MN])
        if (n < whole_from) | (n >= whole_to):
            key = begin + n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
            s_MN = gl.where((key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None]), s_MN, float("-inf"))
        p_MN = gl.exp2(s_MN * in_base_2 - lse[:, None])
        dp_MN = warpgroup_mma_wait(0, deps=[dp_MN])
        ds = gl.convert_layout((p_MN * (dp_MN - delta[:, None])).to(q_tile.dtype), FACTOR)
        dq_MD = warpgroup_mma(ds, k_tile, dq_MD, is_async=True)
        dq_MD = warpgroup_mma_wait(0, deps=[dq_MD])
        mbarrier.arrive(free.index(slot))
    q_tile.store((dq_MD * scale).to(q_tile.dtype))  # this consumer's queries are not read any more
    fence_async_shared()
    mbarrier.arrive(done.index(PART))


@gluon.jit
def dq_kernel(
    q, k, v, dout, dq, lse_ptr, delta_ptr, table, q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b,
    v_stride_h, dout_stride_b, dout_stride_h, queries, keys, group, window, scale,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, TABLE: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    tile = gl.num_programs(0) - 1 - gl.program_id(0)  # the longest causal rows first, so that no one waits for them
    head, batch, heads, batches = gl.program_id(1), gl.program_id(2), gl.num_programs(1), gl.num_programs(2)
    kv_head = head // group
    row = tile * (2 * ROWS)
    i = row + gl.arange(0, 2 * ROWS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    lo, hi = seen_keys(i, table, batch, batches, queries, keys, window, CAUSAL, WINDOW, TABLE)
    begin, turns, whole_from, whole_to = _walk(lo, hi, i < queries, keys, BLOCK_N)
    q_tiles = gl.allocate_shared_memory(q.dtype, [2, ROWS, WIDTH], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, WIDTH], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, BLOCK_N, WIDTH], v.layout)
    do_tiles = gl.allocate_shared_memory(dout.dtype, [2, ROWS, WIDTH], dout.layout)
    own, done, filled, free = _barriers(STAGES, 1)
    at = (batch * heads + head).to(gl.int64) * queries
    q_column, k_column = batch * q_stride_b + head * q_stride_h, batch * k_stride_b + kv_head * k_stride_h
    v_column, do_column = batch * v_stride_b + kv_head * v_stride_h, batch * dout_stride_b + head * dout_stride_h
    out_column = (batch * heads + head) * WIDTH
    gl.warp_specialize(
        [
            (
                _consume_keys,
                (lse_ptr, delta_ptr, table, q_tiles, k_tiles, v_tiles, do_tiles, own, done, filled, free, row, at,
                 batch, batches, queries, keys, window, begin, turns, whole_from, whole_to, scale, FIRST,
                 CAUSAL, WINDOW, TABLE, STAGES, BLOCK_N, WIDTH),
            ),
            (
                _consume_keys,
                (lse_ptr, delta_ptr, table, q_tiles, k_tiles, v_tiles, do_tiles, own, done, filled, free, row, at,
                 batch, batches, queries, keys, window, begin, turns, whole_from, whole_to, scale, SECOND,
                 CAUSAL, WINDOW, TABLE, STAGES, BLOCK_N, WIDTH),
            ),
            (
                _feed_keys,
                (q, k, v, dout, dq, q_tiles, k_tiles, v_tiles, do_tiles, own, done, filled, free, row, q_column,
                 k_column, v_column, do_column, out_column, begin, turns, STAGES, BLOCK_N),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
