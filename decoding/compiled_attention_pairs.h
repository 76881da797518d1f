// Attention where the CPU multiplies bfloat16: keys by pairs of numbers, values by pairs of positions.
//
// Knows slots and heads; knows nothing of other rows. Pairs are the same whatever is computed beside them, so that every
// sum has one order. Queries and weights are rounded to bfloat16, as on an accelerator; sums are float32.
//
// Shapes: Q queries, F head width, T positions of a row.

#pragma once

#if defined(__AVX512BF16__)

#include "compiled_attention_parts.h"

namespace {

// Parts of 16 numbers, two to a vector; a last one that is alone leaves half of it empty.
constexpr int num_twos(int parts) { return (parts + 1) / 2; }

template <int PARTS> inline __m512i load_two(const void *from, int two) {
    const char *place = static_cast<const char *>(from) + two * 64;
    if (2 * two + 1 < PARTS) return _mm512_loadu_si512(place);
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(place)));
}

inline Floats add_products(Floats sums, __m512i one, __m512i other) {
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)one, (__m512bh)other);
}

template <int PARTS, int QUERIES>
void score(const Query *queries, const Context<Bfloat16Product> &context, int64_t longest, bool is_near,
           float *scores_QT) {
    constexpr int TWOS = num_twos(PARTS);
    const float scale = 1.0f / std::sqrt(static_cast<float>(PARTS * LANES));
    const int64_t stride = padded(longest);
    __m512i query[QUERIES][TWOS];
    for (int each = 0; each < QUERIES; each++) {
        alignas(64) Bfloat16 rounded[TWOS * 2 * LANES] = {};
        for (int part = 0; part < PARTS; part++)
            store(rounded + part * LANES, load(queries[each].query + part * LANES) * scale);
        for (int two = 0; two < TWOS; two++) query[each][two] = load_two<2 * TWOS>(rounded, two);
    }
    for (int64_t position = 0; position < longest; position += LANES) {
        Floats products[QUERIES][LANES];
        for (int lane = 0; lane < LANES; lane++) {
            // Past the end the last position stands in.
            const Bfloat16Product *key = context.key(std::min(position + lane, longest - 1));
            if (!is_near) context.template prefetch<PARTS * LANES>(std::min(position + lane + LANES, longest - 1));
            __m512i keys[TWOS];
            for (int two = 0; two < TWOS; two++) keys[two] = load_two<PARTS>(key, two);
            for (int each = 0; each < QUERIES; each++) {
                Floats sums = {};
                for (int two = 0; two < TWOS; two++) sums = add_products(sums, query[each][two], keys[two]);
                products[each][lane] = sums;
            }
        }
        for (int each = 0; each < QUERIES; each++) store(scores_QT + each * stride + position, sum_each(products[each]));
    }
}

// Two positions' values side by side: numbers 0 … 3 of each eight of a vector of 32, or 4 … 7.
template <bool UPPER> inline __m512i side_by_side(__m512i first, __m512i second) {
    return UPPER ? _mm512_unpackhi_epi16(first, second) : _mm512_unpacklo_epi16(first, second);
}

// Back in order, from sums of the lower and the upper fours.
inline void store_in_order(float *to, Floats lower, Floats upper, bool both) {
    constexpr Words FIRST = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
    store(to, picked(lower, upper, FIRST));
    if (both) store(to + LANES, picked(lower, upper, FIRST + 8));
}

template <int PARTS, int QUERIES>
void weigh(const Query *queries, const Context<Bfloat16Product> &context, int64_t shortest, int64_t stride,
           const float *wholes, float *scores_QT) {
    // Weights take the places of half of the scores.
    Bfloat16 *weights[QUERIES];
    for (int each = 0; each < QUERIES; each++) {
        weights[each] = reinterpret_cast<Bfloat16 *>(scores_QT + each * stride);
        for (int64_t position = 0; position < stride; position += LANES)
            store(weights[each] + position, load(scores_QT + each * stride + position));
    }
    const auto weights_at = [&](int each, int64_t position) {
        int32_t pair;
        std::memcpy(&pair, weights[each] + position, sizeof pair);
        return _mm512_set1_epi32(pair);
    };
    const int64_t shared = shortest / 2 * 2;
    for (int two = 0; two < num_twos(PARTS); two++) {
        Floats lower[QUERIES] = {}, upper[QUERIES] = {};
        const auto add_pair = [&](int each, int64_t position, __m512i first, __m512i second) {
            const __m512i own = weights_at(each, position);
            lower[each] = add_products(lower[each], own, side_by_side<false>(first, second));
            upper[each] = add_products(upper[each], own, side_by_side<true>(first, second));
        };
        for (int64_t position = 0; position < shared; position += 2) {
            const __m512i first = load_two<PARTS>(context.value(position), two);
            const __m512i second = load_two<PARTS>(context.value(position + 1), two);
            for (int each = 0; each < QUERIES; each++) add_pair(each, position, first, second);
        }
        // What a later token holds, be it no number, is nothing to an earlier one.
        for (int each = 0; each < QUERIES; each++) {
            for (int64_t position = shared; position < queries[each].length; position += 2) {
                const bool both = position + 1 < queries[each].length;
                const __m512i first = load_two<PARTS>(context.value(position), two);
                const __m512i second =
                    both ? load_two<PARTS>(context.value(position + 1), two) : _mm512_setzero_si512();
                add_pair(each, position, first, second);
            }
            store_in_order(queries[each].attended + two * 2 * LANES, lower[each] / wholes[each],
                           upper[each] / wholes[each], 2 * two + 1 < PARTS);
        }
    }
}

} // namespace

#endif
