"""The Triton kernels of flash attention: forward, the backward's preparation, dK/dV, and dQ. Launched by
`flash_triton.py`.

Every mask of a language model is an interval: query i sees the keys [lo(i), hi(i)), with lo and hi not falling as i
grows. Causal, sliding window, documents and variable lengths differ only in lo and hi, computed here for the first two
and loaded from tables for the others. A tile of queries then walks over three spans of keys: tiles cut by some lower
bound, tiles that all its queries see whole (no mask is computed), tiles cut by some upper bound. dK/dV walks the other
way by the same rule.

The scores live in base 2: p = 2^(scale log2(e) q.k - max). The backward is split (dK/dV by key tiles, dQ by query
tiles) and recomputes the scores in both: 7 matrix products instead of 5, but no atomics, so the same bits every time.
A group's query heads are walked inside one dK/dV program, and summed there in fp32.

Tiles are read through tensor descriptors (TMA) where DESCRIPTORS is set, with the 4-D view [B, heads, rows, D] that
fills with zeros beyond each head's own rows, and through pointers otherwise.

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim; M queries and N keys of a tile.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(source, batch, head, row, rows, stride, DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
          BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows [row, row + ROWS) of one head, zeros beyond `rows` and WIDTH. A pointer `source` stands at the head
    already."""
    if DESCRIPTORS:
        return source.load([batch, head, row, 0]).reshape([ROWS, BLOCK_D])
    else:
        at = row + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK_D)
        pointers = source + at.to(tl.int64)[:, None] * stride + column[None, :]
        mask = (at < rows)[:, None]
        if WIDTH != BLOCK_D:
            mask = mask & (column < WIDTH)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _head(source, batch, head, stride_b, stride_h, DESCRIPTORS: tl.constexpr):
    """A pointer moved to one head; a descriptor as it is."""
    if DESCRIPTORS:
        return source
    else:
        return source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def _store(target, batch, head, row, rows, heads, total_batch, value, ROWS: tl.constexpr, WIDTH: tl.constexpr,
           BLOCK_D: tl.constexpr):  # fmt: skip
    """Write a tile into a contiguous [rows, B, heads, D] tensor."""
    at = row + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    offsets = ((at.to(tl.int64) * total_batch + batch) * heads + head)[:, None] * WIDTH + column[None, :]
    mask = (at < rows)[:, None] & (column < WIDTH)[None, :]
    tl.store(target + offsets, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _seen_keys(i, table, batch, queries, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TABLE: tl.constexpr):
    """[lo, hi) of the keys that query i sees; table: int32 [2, B, S]."""
    if TABLE:
        at = table + batch.to(tl.int64) * queries + i
        lo = tl.load(at, mask=i < queries, other=0)
        hi = tl.load(at + tl.num_programs(2).to(tl.int64) * queries, mask=i < queries, other=0)
    else:
        here = i + (keys - queries)
        lo = i * 0
        hi = lo + keys
        if CAUSAL:
            hi = tl.minimum(tl.maximum(here + 1, 0), keys)
        if WINDOW:
            lo = tl.minimum(tl.maximum(here - window + 1, 0), keys)
    return lo, hi


@triton.jit
def _seeing_queries(j, table, batch, queries, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                    TABLE: tl.constexpr):  # fmt: skip
    """[lo, hi) of the queries that see key j; table: int32 [2, B, T]."""
    if TABLE:
        at = table + batch.to(tl.int64) * keys + j
        lo = tl.load(at, mask=j < keys, other=0)
        hi = tl.load(at + tl.num_programs(2).to(tl.int64) * keys, mask=j < keys, other=0)
    else:
        here = j - (keys - queries)
        lo = j * 0
        hi = lo + queries
        if CAUSAL:
            lo = tl.minimum(tl.maximum(here, 0), queries)
        if WINDOW:
            hi = tl.minimum(tl.maximum(here + window, 0), queries)
    return lo, hi


@triton.jit
def _spans(lo, hi, inside, limit, STEP: tl.constexpr):
    """Where the masked head, the whole middle and the masked tail of a walk begin and end, in multiples of STEP."""
    begin = tl.min(tl.where(inside, lo, limit)) // STEP * STEP
    end = tl.maximum(tl.max(tl.where(inside, hi, 0)), begin)
    whole_from = (tl.max(tl.where(inside, lo, 0)) + STEP - 1) // STEP * STEP
    whole_to = tl.min(tl.where(inside, hi, limit)) // STEP * STEP
    first_cut = tl.minimum(tl.maximum(whole_from, begin), (end + STEP - 1) // STEP * STEP)
    second_cut = tl.maximum(whole_to, first_cut)
    return begin, first_cut, second_cut, end


@triton.jit
def _scores(dot, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in base 2, and the factor by which the soft cap damps their gradient."""
    if SOFTCAP:
        bent = 2 * tl.sigmoid(dot * (2 * scale / softcap)) - 1  # tanh
        return bent * (softcap * LOG2E), 1 - bent * bent
    else:
        return dot * (scale * LOG2E), 1.0


@triton.jit
def _forward_span(
    acc, total, largest, q, lo, hi, k, v, batch, kv_head, start, stop, keys, k_stride, v_stride, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for j in range(start, stop, BLOCK_N):
        k_ND = _tile(k, batch, kv_head, j, keys, k_stride, DESCRIPTORS, BLOCK_N, WIDTH, BLOCK_D)
        s_MN, _ = _scores(tl.dot(q, tl.trans(k_ND), input_precision=PRECISION), scale, softcap, SOFTCAP)
        if MASKED:
            key = j + tl.arange(0, BLOCK_N)[None, :]
            s_MN = tl.where((key >= lo[:, None]) & (key < hi[:, None]), s_MN, float("-inf"))
        new = tl.maximum(largest, tl.max(s_MN, 1))
        base = new
        if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
            base = tl.where(new == float("-inf"), 0.0, new)
        p_MN = tl.exp2(s_MN - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(p_MN, 1)
        v_ND = _tile(v, batch, kv_head, j, keys, v_stride, DESCRIPTORS, BLOCK_N, WIDTH, BLOCK_D)
        acc = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc * shrink[:, None], input_precision=PRECISION)
        largest = new
    return acc, total, largest


@triton.jit
def forward_kernel(
    q, k, v, out_ptr, lse_ptr, table,
    q_stride_s, q_stride_b, q_stride_h, k_stride_s, k_stride_b, k_stride_h, v_stride_s, v_stride_b, v_stride_h,
    queries, keys, heads, group, window, scale, softcap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TABLE: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest causal rows first, so that no one waits for them
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // group
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lo, hi = _seen_keys(i, table, batch, queries, keys, window, CAUSAL, WINDOW, TABLE)
    begin, first_cut, second_cut, end = _spans(lo, hi, i < queries, keys, BLOCK_N)
    q = _head(q, batch, head, q_stride_b, q_stride_h, DESCRIPTORS)
    k = _head(k, batch, kv_head, k_stride_b, k_stride_h, DESCRIPTORS)
    v = _head(v, batch, kv_head, v_stride_b, v_stride_h, DESCRIPTORS)
    q_MD = _tile(q, batch, head, tile * BLOCK_M, queries, q_stride_s, DESCRIPTORS, BLOCK_M, WIDTH, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if WINDOW or TABLE:
        acc, total, largest = _forward_span(
            acc, total, largest, q_MD, lo, hi, k, v, batch, kv_head, begin, first_cut, keys, k_stride_s, v_stride_s,
            scale, softcap, True, SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_N, WIDTH, BLOCK_D)  # fmt: skip
    acc, total, largest = _forward_span(
        acc, total, largest, q_MD, lo, hi, k, v, batch, kv_head, first_cut, second_cut, keys, k_stride_s, v_stride_s,
        scale, softcap, False, SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_N, WIDTH, BLOCK_D)  # fmt: skip
    acc, total, largest = _forward_span(
        acc, total, largest, q_MD, lo, hi, k, v, batch, kv_head, second_cut, end, keys, k_stride_s, v_stride_s,
        scale, softcap, True, SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_N, WIDTH, BLOCK_D)  # fmt: skip
    seen = total > 0
    safe_total = tl.where(seen, total, 1.0)
    _store(out_ptr, batch, head, tile * BLOCK_M, queries, heads, tl.num_programs(2), acc / safe_total[:, None], BLOCK_M,
           WIDTH, BLOCK_D)  # fmt: skip
    lse = tl.where(seen, (largest + tl.log2(safe_total)) / LOG2E, float("-inf"))
    lse_at = lse_ptr + (batch * heads + head).to(tl.int64) * queries + i
    tl.store(lse_at, lse, mask=i < queries)


@triton.jit
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, stride_s, stride_b, stride_h, queries, heads,
    HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = sum over D of out * dout, less the gradient of the log-sum-exp: the part of dS common to a row."""
    head, batch = tl.program_id(1), tl.program_id(2)
    start = tl.program_id(0) * BLOCK_M
    i = start + tl.arange(0, BLOCK_M)
    step = tl.num_programs(2).to(tl.int64) * heads * WIDTH
    own = out_ptr + (batch * heads + head).to(tl.int64) * WIDTH
    out_MD = _tile(own, batch, head, start, queries, step, False, BLOCK_M, WIDTH, BLOCK_D)
    dout = _head(dout_ptr, batch, head, stride_b, stride_h, False)
    dout_MD = _tile(dout, batch, head, start, queries, stride_s, False, BLOCK_M, WIDTH, BLOCK_D)
    delta = tl.sum(out_MD.to(tl.float32) * dout_MD.to(tl.float32), 1)
    at = (batch * heads + head).to(tl.int64) * queries + i
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=i < queries, other=0.0)
    tl.store(delta_ptr + at, delta, mask=i < queries)


@triton.jit
def _row_numbers(lse_ptr, delta_ptr, at, i, queries):
    """Base-2 log-sum-exp and delta of queries i; +inf where there is no row, so that p is 0 without a mask. A row that
    saw no key (-inf) lies in masked tiles only."""
    lse = tl.load(lse_ptr + at + i, mask=i < queries, other=float("inf"))
    return lse * LOG2E, tl.load(delta_ptr + at + i, mask=i < queries, other=0.0)


@triton.jit
def _dkdv_span(
    dk, dv, k_ND, v_ND, lo, hi, q, dout, lse_ptr, delta_ptr, row_at, batch, head, start, stop, queries, q_stride,
    dout_stride, scale, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for row in range(start, stop, BLOCK_M):
        i = row + tl.arange(0, BLOCK_M)
        q_MD = _tile(q, batch, head, row, queries, q_stride, DESCRIPTORS, BLOCK_M, WIDTH, BLOCK_D)
        lse, delta = _row_numbers(lse_ptr, delta_ptr, row_at, i, queries)
        s_NM, damp = _scores(tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION), scale, softcap, SOFTCAP)
        p_NM = tl.exp2(s_NM - lse[None, :])
        if MASKED:  # after the exponential: what it made of a masked score may be inf
            p_NM = tl.where((i[None, :] >= lo[:, None]) & (i[None, :] < hi[:, None]), p_NM, 0.0)
        do_MD = _tile(dout, batch, head, row, queries, dout_stride, DESCRIPTORS, BLOCK_M, WIDTH, BLOCK_D)
        dv = tl.dot(p_NM.to(do_MD.dtype), do_MD, dv, input_precision=PRECISION)
        dp_NM = tl.dot(v_ND, tl.trans(do_MD), input_precision=PRECISION)
        ds_NM = p_NM * (dp_NM - delta[None, :]) * damp
        dk = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    q, k, v, dout, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table,
    q_stride_s, q_stride_b, q_stride_h, k_stride_s, k_stride_b, k_stride_h, v_stride_s, v_stride_b, v_stride_h,
    dout_stride_s, dout_stride_b, dout_stride_h, queries, keys, heads, group, window, scale, softcap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TABLE: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)  # the first keys have most queries
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    lo, hi = _seeing_queries(j, table, batch, queries, keys, window, CAUSAL, WINDOW, TABLE)
    begin, first_cut, second_cut, end = _spans(lo, hi, j < keys, queries, BLOCK_M)
    k = _head(k, batch, kv_head, k_stride_b, k_stride_h, DESCRIPTORS)
    v = _head(v, batch, kv_head, v_stride_b, v_stride_h, DESCRIPTORS)
    k_ND = _tile(k, batch, kv_head, tile * BLOCK_N, keys, k_stride_s, DESCRIPTORS, BLOCK_N, WIDTH, BLOCK_D)
    v_ND = _tile(v, batch, kv_head, tile * BLOCK_N, keys, v_stride_s, DESCRIPTORS, BLOCK_N, WIDTH, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        row_at = (batch * heads + head).to(tl.int64) * queries
        q_head = _head(q, batch, head, q_stride_b, q_stride_h, DESCRIPTORS)
        do_head = _head(dout, batch, head, dout_stride_b, dout_stride_h, DESCRIPTORS)
        if CAUSAL or TABLE:
            dk, dv = _dkdv_span(
                dk, dv, k_ND, v_ND, lo, hi, q_head, do_head, lse_ptr, delta_ptr, row_at, batch, head, begin, first_cut,
                queries, q_stride_s, dout_stride_s, scale, softcap, True, SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_M,
                WIDTH, BLOCK_D)  # fmt: skip
        whole_end = second_cut if WINDOW or TABLE else end  # rows beyond the last query need no mask: their p is 0
        dk, dv = _dkdv_span(
            dk, dv, k_ND, v_ND, lo, hi, q_head, do_head, lse_ptr, delta_ptr, row_at, batch, head, first_cut, whole_end,
            queries, q_stride_s, dout_stride_s, scale, softcap, False, SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_M,
            WIDTH, BLOCK_D)  # fmt: skip
        if WINDOW or TABLE:
            dk, dv = _dkdv_span(
                dk, dv, k_ND, v_ND, lo, hi, q_head, do_head, lse_ptr, delta_ptr, row_at, batch, head, second_cut, end,
                queries, q_stride_s, dout_stride_s, scale, softcap, True, SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_M,
                WIDTH, BLOCK_D)  # fmt: skip
    kv_heads = tl.num_programs(1)
    _store(dk_ptr, batch, kv_head, tile * BLOCK_N, keys, kv_heads, tl.num_programs(2), dk * scale, BLOCK_N, WIDTH,
           BLOCK_D)  # fmt: skip
    _store(dv_ptr, batch, kv_head, tile * BLOCK_N, keys, kv_heads, tl.num_programs(2), dv, BLOCK_N, WIDTH, BLOCK_D)


@triton.jit
def _dq_span(
    dq, q_MD, do_MD, lse, delta, lo, hi, k, v, batch, kv_head, start, stop, keys, k_stride, v_stride, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for j in range(start, stop, BLOCK_N):
        k_ND = _tile(k, batch, kv_head, j, keys, k_stride, DESCRIPTORS, BLOCK_N, WIDTH, BLOCK_D)
        v_ND = _tile(v, batch, kv_head, j, keys, v_stride, DESCRIPTORS, BLOCK_N, WIDTH, BLOCK_D)
        s_MN, damp = _scores(tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION), scale, softcap, SOFTCAP)
        p_MN = tl.exp2(s_MN - lse[:, None])
        if MASKED:
            key = j + tl.arange(0, BLOCK_N)[None, :]
            p_MN = tl.where((key >= lo[:, None]) & (key < hi[:, None]), p_MN, 0.0)
        dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision=PRECISION)
        ds_MN = p_MN * (dp_MN - delta[:, None]) * damp
        dq = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q, k, v, dout, lse_ptr, delta_ptr, dq_ptr, table,
    q_stride_s, q_stride_b, q_stride_h, k_stride_s, k_stride_b, k_stride_h, v_stride_s, v_stride_b, v_stride_h,
    dout_stride_s, dout_stride_b, dout_stride_h, queries, keys, heads, group, window, scale, softcap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TABLE: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // group
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lo, hi = _seen_keys(i, table, batch, queries, keys, window, CAUSAL, WINDOW, TABLE)
    begin, first_cut, second_cut, end = _spans(lo, hi, i < queries, keys, BLOCK_N)
    q = _head(q, batch, head, q_stride_b, q_stride_h, DESCRIPTORS)
    dout = _head(dout, batch, head, dout_stride_b, dout_stride_h, DESCRIPTORS)
    k = _head(k, batch, kv_head, k_stride_b, k_stride_h, DESCRIPTORS)
    v = _head(v, batch, kv_head, v_stride_b, v_stride_h, DESCRIPTORS)
    q_MD = _tile(q, batch, head, tile * BLOCK_M, queries, q_stride_s, DESCRIPTORS, BLOCK_M, WIDTH, BLOCK_D)
    do_MD = _tile(dout, batch, head, tile * BLOCK_M, queries, dout_stride_s, DESCRIPTORS, BLOCK_M, WIDTH, BLOCK_D)
    lse, delta = _row_numbers(lse_ptr, delta_ptr, (batch * heads + head).to(tl.int64) * queries, i, queries)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW or TABLE:
        dq = _dq_span(dq, q_MD, do_MD, lse, delta, lo, hi, k, v, batch, kv_head, begin, first_cut, keys, k_stride_s,
                      v_stride_s, scale, softcap, True, SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_N, WIDTH,
                      BLOCK_D)  # fmt: skip
    dq = _dq_span(dq, q_MD, do_MD, lse, delta, lo, hi, k, v, batch, kv_head, first_cut, second_cut, keys, k_stride_s,
                  v_stride_s, scale, softcap, False, SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_N, WIDTH,
                  BLOCK_D)  # fmt: skip
    dq = _dq_span(dq, q_MD, do_MD, lse, delta, lo, hi, k, v, batch, kv_head, second_cut, end, keys, k_stride_s,
                  v_stride_s, scale, softcap, True, SOFTCAP, DESCRIPTORS, PRECISION, BLOCK_N, WIDTH,
                  BLOCK_D)  # fmt: skip
    _store(dq_ptr, batch, head, tile * BLOCK_M, queries, heads, tl.num_programs(2), dq * scale, BLOCK_M, WIDTH, BLOCK_D)
