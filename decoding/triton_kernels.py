"""Triton kernels: rotate and store what is new, attend paged contexts in parts, join the parts.

Know addresses; know nothing of which tokens are drafts. Every length is read on the device.

A row's context is cut into parts whose width depends on its length alone, and every tile of queries has the same
height, so that a query is computed by the same operations whatever stands beside it.

`contexts` [B, 2 + W] say of each row, in int32: the position of its 0-th token, its length after this step, its
blocks. Tokens from that length on are padding: they are not stored, and what is attended for them means nothing.
`rows` and `steps` say of each token its row and how many tokens of the row come before it, counted from the 0-th.
Tensors are contiguous; `qkv` is [N, (H + 2G)·F], `cache` [slots, 2·G·F], `out` [N, H·F]. HEAD_PAD is a power of
two that holds a head, at least 16, which is the least that `tl.dot` takes.

Names end in shapes: M queries of a tile, N positions read at once, F a head, P parts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["context_width"])
def rotate_and_store(
    qkv,
    cache,
    turns,
    rows,
    steps,
    contexts,
    context_width,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One token, HEADS of its heads: queries are rotated in place, keys rotated into the cache, values copied."""
    PAIRS: tl.constexpr = HEAD_WIDTH // 2
    NUM_QK: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    NUM_ALL: tl.constexpr = NUM_QK + NUM_KV_HEADS
    token = tl.program_id(0)
    context = contexts + tl.load(rows + token) * context_width
    position = tl.load(context) + tl.load(steps + token)
    block = tl.load(context + 2 + position // BLOCK_SIZE).to(tl.int64)
    slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HEAD_PAD // 2)[None, :]
    exists = (head < NUM_ALL) & (pair < PAIRS)
    own = qkv + token.to(tl.int64) * (NUM_ALL * HEAD_WIDTH) + head * HEAD_WIDTH + 2 * pair
    first = tl.load(own, mask=exists, other=0.0)
    second = tl.load(own + 1, mask=exists, other=0.0)
    turn = turns + position * HEAD_WIDTH + 2 * pair
    cos = tl.load(turn, mask=pair < PAIRS, other=1.0)
    sin = tl.load(turn + 1, mask=pair < PAIRS, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    is_turned = head < NUM_QK
    first = tl.where(is_turned, (x * cos - y * sin).to(first.dtype), first)
    second = tl.where(is_turned, (x * sin + y * cos).to(second.dtype), second)
    is_query = exists & (head < NUM_HEADS)
    tl.store(own, first, mask=is_query)
    tl.store(own + 1, second, mask=is_query)
    # Keys and values lie in a slot as they do in `qkv`.
    stored = cache + slot * (2 * NUM_KV_HEADS * HEAD_WIDTH) + (head - NUM_HEADS) * HEAD_WIDTH + 2 * pair
    is_kept = exists & (head >= NUM_HEADS) & (position < tl.load(context + 1))
    tl.store(stored, first, mask=is_kept)
    tl.store(stored + 1, second, mask=is_kept)


@triton.jit
def part_width(length, LEAST_PART: tl.constexpr, MOST_PARTS: tl.constexpr):
    """The least doubling of LEAST_PART of which MOST_PARTS hold a context of this length."""
    width = LEAST_PART
    while width * MOST_PARTS < length:
        width *= 2
    return width


@triton.jit
def attend_span(
    queries_MF,
    positions_M,
    keys,
    blocks,
    first,
    last,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Positions first … last − 1 for queries that see up to theirs: peaks of the scores, totals of the weights,
    sums of the weighted values. Scores are exponents of two; weights are relative to the peak.
    """
    f = tl.arange(0, HEAD_PAD)
    is_f = f < HEAD_WIDTH
    peak_M = tl.full([TILE_M], float("-inf"), tl.float32)
    total_M = tl.zeros([TILE_M], tl.float32)
    sum_MF = tl.zeros([TILE_M, HEAD_PAD], tl.float32)
    for begin in range(first, last, TILE_N):
        t = begin + tl.arange(0, TILE_N)
        is_t = t < last
        block = tl.load(blocks + t // BLOCK_SIZE, mask=is_t, other=0).to(tl.int64)
        key = keys + (block * BLOCK_SIZE + t % BLOCK_SIZE) * (2 * NUM_KV_HEADS * HEAD_WIDTH)
        keys_FN = tl.load(key[None, :] + f[:, None], mask=is_t[None, :] & is_f[:, None], other=0.0)
        scores_MN = tl.dot(queries_MF, keys_FN, input_precision="ieee") * scale
        is_seen = is_t[None, :] & (t[None, :] <= positions_M[:, None])
        scores_MN = tl.where(is_seen, scores_MN, float("-inf"))
        new_peak_M = tl.maximum(peak_M, tl.max(scores_MN, 1))
        # A query that sees nothing yet has a peak of −∞, from which nothing may be subtracted.
        base_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
        shrink_M = tl.exp2(peak_M - base_M)
        weights_MN = tl.exp2(scores_MN - base_M[:, None])
        value = key + NUM_KV_HEADS * HEAD_WIDTH
        values_NF = tl.load(value[:, None] + f[None, :], mask=is_t[:, None] & is_f[None, :], other=0.0)
        seen_MF = tl.dot(weights_MN.to(values_NF.dtype), values_NF, input_precision="ieee")
        sum_MF = sum_MF * shrink_M[:, None] + seen_MF
        total_M = total_M * shrink_M + tl.sum(weights_MN, 1)
        peak_M = new_peak_M
    return peak_M, total_M, sum_MF


@triton.jit(do_not_specialize=["context_width"])
def attend_tile(
    out,
    parts,
    weights,
    qkv,
    cache,
    tiles,
    contexts,
    context_width,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    LEAST_PART: tl.constexpr,
    MOST_PARTS: tl.constexpr,
):
    """A tile of queries of one row that share a key, against one part of its context: (tile, G, part).

    `tiles` are [row, token, step, number of queries, scratch index] each. Unless split, the one part's
    result is final; else sums go to `parts` [M, H, P, F] and their (peak, total) to `weights`, in float32.
    `scale` includes log₂ e.
    """
    REPEATS: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    tile = tiles + tl.program_id(0) * 5
    group, part = tl.program_id(1), tl.program_id(2)
    row, token, step = tl.load(tile), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2)
    num_queries, scratch = tl.load(tile + 3), tl.load(tile + 4).to(tl.int64)
    context = contexts + row * context_width
    start = tl.load(context)
    length = tl.load(context + 1)
    width = part_width(length, LEAST_PART, MOST_PARTS)
    # What lies behind the row's length was not stored.
    first, last = part * width, tl.minimum(start + step + num_queries, length)
    if IS_SPLIT:
        last = tl.minimum(first + width, last)
    if (first >= last) | (start + step >= length):
        return

    query = tl.arange(0, TILE_M) // REPEATS
    head = group * REPEATS + tl.arange(0, TILE_M) % REPEATS
    is_query = query < num_queries
    # Rows of the tile that are no query see what the last one sees, so that no sum is empty.
    position = start + step + tl.minimum(query, num_queries - 1)
    f = tl.arange(0, HEAD_PAD)
    is_f = f < HEAD_WIDTH
    own = (token + query) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_WIDTH) + head * HEAD_WIDTH
    queries_MF = tl.load(qkv + own[:, None] + f[None, :], mask=is_query[:, None] & is_f[None, :], other=0.0)

    peak_M, total_M, sum_MF = attend_span(
        queries_MF,
        position,
        cache + group * HEAD_WIDTH,
        context + 2,
        first,
        last,
        scale,
        NUM_KV_HEADS,
        HEAD_WIDTH,
        HEAD_PAD,
        BLOCK_SIZE,
        TILE_M,
        TILE_N,
    )
    exists = is_query[:, None] & is_f[None, :]
    if IS_SPLIT:
        place = ((scratch + query) * NUM_HEADS + head) * tl.num_programs(2) + part
        tl.store(parts + place[:, None] * HEAD_WIDTH + f[None, :], sum_MF, mask=exists)
        tl.store(weights + place * 2, peak_M, mask=is_query)
        tl.store(weights + place * 2 + 1, total_M, mask=is_query)
    else:
        place = (token + query) * (NUM_HEADS * HEAD_WIDTH) + head * HEAD_WIDTH
        attended_MF = sum_MF / total_M[:, None]
        tl.store(out + place[:, None] + f[None, :], attended_MF.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["context_width", "num_parts"])
def join_parts(
    out,
    parts,
    weights,
    tokens,
    rows,
    steps,
    contexts,
    context_width,
    num_parts,
    NUM_HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    LEAST_PART: tl.constexpr,
    MOST_PARTS: tl.constexpr,
):
    """One head of one query: (M, H). Parts behind the query's position were not written and are not read."""
    scratch, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(tokens + scratch)
    context = contexts + tl.load(rows + token) * context_width
    position, length = tl.load(context) + tl.load(steps + token), tl.load(context + 1)
    if position >= length:
        return
    width = part_width(length, LEAST_PART, MOST_PARTS)
    part = tl.arange(0, MOST_PARTS)
    is_part = part * width <= position
    place = (scratch.to(tl.int64) * NUM_HEADS + head) * num_parts + part
    peak_P = tl.load(weights + place * 2, mask=is_part, other=float("-inf"))
    total_P = tl.load(weights + place * 2 + 1, mask=is_part, other=0.0)
    share_P = tl.exp2(peak_P - tl.max(peak_P, 0))
    f = tl.arange(0, HEAD_PAD)
    is_f = f < HEAD_WIDTH
    sums = parts + place[:, None] * HEAD_WIDTH + f[None, :]
    sum_PF = tl.load(sums, mask=is_part[:, None] & is_f[None, :], other=0.0)
    attended_F = tl.sum(sum_PF * share_P[:, None], 0) / tl.sum(total_P * share_P, 0)
    own = out + token.to(tl.int64) * (NUM_HEADS * HEAD_WIDTH) + head * HEAD_WIDTH + f
    tl.store(own, attended_F.to(out.dtype.element_ty), mask=is_f)
