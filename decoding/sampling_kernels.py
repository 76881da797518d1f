"""Triton kernels of the choice rule and the keep rule, and of the cut that top-k and top-p make.

Know scores and noise keys; know nothing of sequences. What a row gives depends on that row alone: it is read in
pieces of fixed widths, whatever stands beside it.

The noise is version 1 of `decoding.noise`: the same 32 bits, and from them the same operations in float32 but for
the logarithms, which are computed here so that every device and the interpreter give the same bits. Kernels are
to be launched without fused products and sums.

Names end in shapes: C ids read at once, P parts of a row, K drafts.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIRST_MULTIPLIER = tl.constexpr(0x2C1B3C6D)
SECOND_MULTIPLIER = tl.constexpr(0x297A2D39)
HALF_ROOT_BITS = tl.constexpr(0x3F3504F3)
"""Of √½ in float32, below which a mantissa is doubled."""
LN_2_HIGH = tl.constexpr(45426 / 65536)
"""So few bits of ln 2 that its products with exponents are exact."""
LN_2_LOW = tl.constexpr(1.4286068203094172e-06)
LARGEST_U = tl.constexpr(1 - 2.0**-24)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
INFINITE_BITS = tl.constexpr(0x7F800000)
NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def mix(x):
    """`decoding.noise._mix` of unsigned words."""
    x = x ^ (x >> 15)
    x = x * FIRST_MULTIPLIER
    x = x ^ (x >> 12)
    x = x * SECOND_MULTIPLIER
    return x ^ (x >> 15)


@triton.jit
def noise_words(keys, key_stride, row, position, ids_C):
    """The unsigned noise bits of these token ids at one position of one row."""
    at = position.to(tl.int32)
    first = mix((tl.load(keys + row) + at).to(tl.uint32, bitcast=True))
    second = mix((tl.load(keys + key_stride + row) + at).to(tl.uint32, bitcast=True))
    return mix((mix(ids_C.to(tl.uint32)) ^ first) + second)


@triton.jit
def log_of(fraction_C, exponent_C):
    """log(1 + fraction) + exponent · ln 2, for 1 + fraction from √½ to √2, within one unit in the last place.

    With s = f / (2 + f), log(1 + f) = 2 artanh(s) = 2 (s + s³ / 3 + s⁵ / 5 + …), and 2 s = f − s f.
    """
    s_C = tl.div_rn(fraction_C, 2.0 + fraction_C)
    z_C = s_C * s_C
    rest_C = z_C * (2 / 3 + z_C * (2 / 5 + z_C * (2 / 7 + z_C * (2 / 9))))
    low_C = exponent_C * LN_2_LOW - s_C * (fraction_C - rest_C)
    return exponent_C * LN_2_HIGH + (fraction_C + low_C)


@triton.jit
def exponent_of(x_C):
    """The power of two by which a normal x > 0 lies between √½ and √2, as an integer."""
    return (x_C.to(tl.int32, bitcast=True) - HALF_ROOT_BITS) >> 23


@triton.jit
def scaled_down(x_C, exponent_C):
    """x · 2^−exponent, exactly."""
    return (x_C.to(tl.int32, bitcast=True) - (exponent_C << 23)).to(tl.float32, bitcast=True)


@triton.jit
def gumbel(words_C):
    """Standard Gumbel noise of noise bits, as `decoding.noise.gumbel_noise` in float32."""
    u_C = words_C.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32 + 2.0**-33
    # The words were read as signed: the negative ones lie in the upper half.
    u_C = u_C + tl.where(u_C < 0, 1.0, 0.0)
    u_C = tl.minimum(u_C, LARGEST_U)
    rest_C = 1.0 - u_C
    exponent_C = exponent_of(rest_C)
    # 1 − u is rounded where u < ½; its fraction is taken from u there, without rounding.
    upper_C = tl.where(u_C < 0.5, 1.0 - 2.0 * u_C, scaled_down(rest_C, exponent_C) - 1.0)
    fraction_C = tl.where(exponent_C == 0, -u_C, upper_C)
    exponential_C = -log_of(fraction_C, exponent_C.to(tl.float32))
    outer_C = exponent_of(exponential_C)
    return -log_of(scaled_down(exponential_C, outer_C) - 1.0, outer_C.to(tl.float32))


@triton.jit(do_not_specialize=["vocab_size", "row_stride", "key_stride", "num_parts"])
def choose_in_part(
    best_scores,
    best_ids,
    rows,
    peaks,
    temperatures,
    keys,
    positions,
    vocab_size,
    row_stride,
    key_stride,
    num_parts,
    IS_PROCESSED: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The best noised score of one part of a row, and its id: (row, part).

    `rows` are scores if processed, else logits, whose best in each row are the `peaks`. A score that is no number
    is the best of all, as torch's argmax has it; of equal ones the lowest id.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    is_sampled = temperature > 0
    scale = tl.where(is_sampled, tl.maximum(temperature.to(tl.float32), SMALLEST_NORMAL), 1.0)
    peak = 0.0
    if not IS_PROCESSED:
        peak = tl.load(peaks + row).to(tl.float32)
    position = tl.load(positions + row)
    own = rows + row.to(tl.int64) * row_stride
    best_C = tl.full([WIDTH], float("-inf"), tl.float32)
    best_ids_C = tl.full([WIDTH], NO_ID, tl.int32)
    for begin in range(part * PART, tl.minimum(part * PART + PART, vocab_size), WIDTH):
        ids_C = begin + tl.arange(0, WIDTH)
        exists_C = ids_C < vocab_size
        score_C = tl.load(own + ids_C, mask=exists_C, other=float("-inf")).to(tl.float32)
        if not IS_PROCESSED:
            score_C = tl.div_rn(score_C - peak, scale)
        if is_sampled:
            score_C += gumbel(noise_words(keys, key_stride, row, position, ids_C))
        score_C = tl.where(score_C == score_C, score_C, float("inf"))  # noqa: PLR0124
        # What lies behind the row is no number either where its peak is none.
        is_better_C = exists_C & ((score_C > best_C) | (best_ids_C == NO_ID))
        best_C = tl.where(is_better_C, score_C, best_C)
        best_ids_C = tl.where(is_better_C, ids_C, best_ids_C)
    best = tl.max(best_C, 0)
    place = row * num_parts + part
    tl.store(best_scores + place, best)
    tl.store(best_ids + place, tl.min(tl.where(best_C == best, best_ids_C, NO_ID), 0))


@triton.jit(do_not_specialize=["num_parts"])
def choose_among_parts(chosen, best_scores, best_ids, num_parts, PARTS: tl.constexpr):
    """The choice of one row, int64; of equal scores the lowest id."""
    row = tl.program_id(0)
    part_P = tl.arange(0, PARTS)
    is_part_P = part_P < num_parts
    score_P = tl.load(best_scores + row * num_parts + part_P, mask=is_part_P, other=float("-inf"))
    ids_P = tl.load(best_ids + row * num_parts + part_P, mask=is_part_P, other=NO_ID)
    is_best_P = score_P == tl.max(score_P, 0)
    tl.store(chosen + row, tl.min(tl.where(is_best_P, ids_P, NO_ID), 0).to(tl.int64))


@triton.jit
def depths(own, begin, vocab_size, WIDTH: tl.constexpr):
    """How far some scores lie below 0, the best: as float32 and as its bits, which have the same order.

    What lies behind the row is as deep as what was dropped, which weighs nothing.
    """
    ids_C = begin + tl.arange(0, WIDTH)
    depth_C = -tl.load(own + ids_C, mask=ids_C < vocab_size, other=float("-inf"))
    # A best score is +0, −0 or no number.
    depth_C = tl.where(depth_C > 0, depth_C, 0.0)
    return depth_C, depth_C.to(tl.int32, bitcast=True)


@triton.jit
def above(own, vocab_size, bound, WIDTH: tl.constexpr):
    """How many scores of a row are better than the depth with these bits, and the sum of their weights e^score."""
    count_C = tl.zeros([WIDTH], tl.int32)
    weight_C = tl.zeros([WIDTH], tl.float32)
    for begin in range(0, vocab_size, WIDTH):
        depth_C, bits_C = depths(own, begin, vocab_size, WIDTH)
        count_C += (bits_C < bound).to(tl.int32)
        weight_C += tl.where(bits_C < bound, tl.exp(-depth_C), 0.0)
    return tl.sum(count_C, 0), tl.sum(weight_C, 0)


@triton.jit(do_not_specialize=["vocab_size", "row_stride"])
def truncate(scores, top_ks, top_ps, vocab_size, row_stride, WIDTH: tl.constexpr):
    """Drop what top-k and then top-p leave out of one row of scores, whose best is 0.

    A score stays if fewer than `top_k` are better, and if the better ones weigh less than `top_p` of what top-k
    has left. Both hold down to some depth, which is found bit by bit: its order is that of its bits.
    """
    row = tl.program_id(0)
    own = scores + row.to(tl.int64) * row_stride
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    cut = tl.full([], INFINITE_BITS, tl.int32)
    if top_k > 0:
        low = tl.full([], 0, tl.int32)
        while low < cut:
            middle = cut - (cut - low) // 2
            count, _ = above(own, vocab_size, middle, WIDTH)
            low = tl.where(count < top_k, middle, low)
            cut = tl.where(count < top_k, cut, middle - 1)
    if top_p < 1:
        count, total = above(own, vocab_size, cut, WIDTH)
        if top_k > 0:
            # Of several scores at the cut no more weigh than the top-k have room for.
            last = tl.exp(-cut.to(tl.float32, bitcast=True))
            total += (tl.minimum(top_k, vocab_size) - count).to(tl.float32) * last
        bound = top_p.to(tl.float32) * total
        low = tl.full([], 0, tl.int32)
        while low < cut:
            middle = cut - (cut - low) // 2
            _, weight = above(own, vocab_size, middle, WIDTH)
            low = tl.where(weight < bound, middle, low)
            cut = tl.where(weight < bound, cut, middle - 1)
    if cut < INFINITE_BITS:
        for begin in range(0, vocab_size, WIDTH):
            _, bits_C = depths(own, begin, vocab_size, WIDTH)
            ids_C = begin + tl.arange(0, WIDTH)
            tl.store(own + ids_C, float("-inf"), mask=(ids_C < vocab_size) & (bits_C > cut))


@triton.jit(do_not_specialize=["num_drafts", "draft_stride", "choice_stride"])
def keep(kept, drafts, choices, draft_lengths, num_drafts, draft_stride, choice_stride, DRAFTS: tl.constexpr):
    """The keep rule for one row: the place of the first draft that is refused, or past the row's own."""
    row = tl.program_id(0)
    place_K = tl.arange(0, DRAFTS)
    is_own_K = place_K < tl.minimum(tl.load(draft_lengths + row), num_drafts)
    draft_K = tl.load(drafts + row * draft_stride + place_K, mask=is_own_K, other=0)
    choice_K = tl.load(choices + row * choice_stride + place_K, mask=is_own_K, other=0)
    stands_K = is_own_K & (draft_K == choice_K)
    tl.store(kept + row, tl.min(tl.where(stands_K, DRAFTS, place_K), 0).to(tl.int64))
