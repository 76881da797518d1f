// Attention of a row's tokens to its positions, straight from the slots where they lie.
//
// Knows slots and heads; knows nothing of other rows.
//
// Shapes: Q queries that share a key/value head, of one token or several, F head width, T positions of a row.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "compiled_attention_pairs.h"
#include "compiled_attention_parts.h"
#include "compiled_model.h"
#include "compiled_vectors.h"

namespace {

// Products of a key with all queries, for the first `longest` positions and some more that mean nothing.
template <int PARTS, int QUERIES, class Cached>
void score(const Query *queries, const Context<Cached> &context, int64_t longest, bool is_near, float *scores_QT) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(PARTS * LANES));
    const int64_t stride = padded(longest);
    Floats query[QUERIES][PARTS];
    for (int each = 0; each < QUERIES; each++)
        for (int part = 0; part < PARTS; part++) query[each][part] = load(queries[each].query + part * LANES) * scale;
    for (int64_t position = 0; position < longest; position += LANES) {
        Floats products[QUERIES][LANES];
        for (int lane = 0; lane < LANES; lane++) {
            // Past the end the last position stands in.
            const Cached *key = context.key(std::min(position + lane, longest - 1));
            if (!is_near) context.template prefetch<PARTS * LANES>(std::min(position + lane + LANES, longest - 1));
            Floats keys[PARTS];
            for (int part = 0; part < PARTS; part++) keys[part] = load(key + part * LANES);
            for (int each = 0; each < QUERIES; each++) {
                Floats sums = query[each][0] * keys[0];
                for (int part = 1; part < PARTS; part++) sums += query[each][part] * keys[part];
                products[each][lane] = sums;
            }
        }
        for (int each = 0; each < QUERIES; each++) store(scores_QT + each * stride + position, sum_each(products[each]));
    }
}

// e to the power of scores less the best, in their place, 0 past the end up to `stride`; returns their sum.
float exponentials(float *scores_T, int64_t length, int64_t stride) {
    const auto is_counted = [length](int64_t position) {
        return LANE < static_cast<int32_t>(std::min<int64_t>(LANES, length - position));
    };
    Floats bests = Floats{} - INFINITY, totals = {};
    for (int64_t position = 0; position < length; position += LANES) {
        const Floats scores = is_counted(position) ? load(scores_T + position) : Floats{} - INFINITY;
        bests = scores > bests ? scores : bests;
    }
    const float best = highest(bests);
    for (int64_t position = 0; position < length; position += LANES) {
        const Floats raised = is_counted(position) ? exponential(load(scores_T + position) - best) : Floats{};
        totals += raised;
        store(scores_T + position, raised);
    }
    for (int64_t position = padded(length); position < stride; position += LANES) store(scores_T + position, Floats{});
    return sum(totals);
}

// attended = Σ weights · values / wholes, of queries whose rows have `shortest` positions at least.
template <int PARTS, int QUERIES, class Cached>
void weigh(const Query *queries, const Context<Cached> &context, int64_t shortest, int64_t stride, const float *wholes,
           const float *scores_QT) {
    int64_t longest = 0;
    for (int each = 0; each < QUERIES; each++) longest = std::max(longest, queries[each].length);
    for (int part = 0; part < PARTS; part++) {
        Floats sums[QUERIES] = {};
        for (int64_t position = 0; position < shortest; position++) {
            const Floats values = load(context.value(position) + part * LANES);
            for (int each = 0; each < QUERIES; each++) sums[each] += scores_QT[each * stride + position] * values;
        }
        // What a later token holds, be it no number, is nothing to an earlier one.
        for (int64_t position = shortest; position < longest; position++) {
            const Floats values = load(context.value(position) + part * LANES);
            for (int each = 0; each < QUERIES; each++)
                if (position < queries[each].length) sums[each] += scores_QT[each * stride + position] * values;
        }
        for (int each = 0; each < QUERIES; each++)
            store(queries[each].attended + part * LANES, sums[each] / wholes[each]);
    }
}

// attended = Σ softmax(query · keys) values, of queries that one key after the other is read for.
template <class Cached, int PARTS, int QUERIES>
void attend_together(const Query *queries, const Context<Cached> &context, bool is_near, float *scores_QT) {
    int64_t longest = 0, shortest = queries[0].length;
    for (int each = 0; each < QUERIES; each++) {
        longest = std::max(longest, queries[each].length);
        shortest = std::min(shortest, queries[each].length);
    }
    const int64_t stride = padded(longest);
    score<PARTS, QUERIES>(queries, context, longest, is_near, scores_QT);
    float wholes[QUERIES];
    for (int each = 0; each < QUERIES; each++)
        wholes[each] = exponentials(scores_QT + each * stride, queries[each].length, stride);
    weigh<PARTS, QUERIES>(queries, context, shortest, stride, wholes, scores_QT);
}

template <class Cached, int PARTS>
void attend_all(const std::vector<Query> &queries, const Context<Cached> &context, float *scores) {
    const Query *next = queries.data(), *end = next + queries.size();
    const auto attend = [&](auto together) {
        constexpr int QUERIES = decltype(together)::value;
        for (; end - next >= QUERIES; next += QUERIES)
            attend_together<Cached, PARTS, QUERIES>(next, context, next != queries.data(), scores);
    };
    attend(std::integral_constant<int, 9>{});
    attend(std::integral_constant<int, 6>{});
    attend(std::integral_constant<int, 4>{});
    attend(std::integral_constant<int, 3>{});
    attend(std::integral_constant<int, 2>{});
    attend(std::integral_constant<int, 1>{});
}

// Numbers that `attend_row` needs room for.
int64_t num_scores(int64_t longest) { return MOST_QUERIES * (longest + LANES); }

// Tokens first … last − 1, all of one row, whose queries lie `stride` apart.
template <class Cached>
void attend_row(const Model &model, const Layer &layer, const Tokens &tokens, int64_t first, int64_t last,
                const float *queries, int64_t stride, float *scores, float *attended) {
    static thread_local std::vector<Query> together;
    const int64_t width = model.head_width, repeats = model.num_heads / model.num_kv_heads;
    const int64_t query_width = model.num_heads * width;
    for (int64_t group = 0; group < model.num_kv_heads; group++) {
        const Cached *keys = static_cast<const Cached *>(layer.cache) + group * width;
        const Context<Cached> context{keys, keys + model.num_kv_heads * width, 2 * model.num_kv_heads * width,
                                      tokens.slots(first)};
        together.clear();
        for (int64_t token = first; token < last; token++)
            for (int64_t head = group * repeats; head < (group + 1) * repeats; head++)
                together.push_back({queries + token * stride + head * width, attended + token * query_width + head * width,
                                    tokens.position(token) + 1});
        const auto attend = [&](auto parts) { attend_all<Cached, decltype(parts)::value>(together, context, scores); };
        switch (width / LANES) {
        case 1: attend(std::integral_constant<int, 1>{}); break;
        case 2: attend(std::integral_constant<int, 2>{}); break;
        case 4: attend(std::integral_constant<int, 4>{}); break;
        case 5: attend(std::integral_constant<int, 5>{}); break;
        case 6: attend(std::integral_constant<int, 6>{}); break;
        default: attend(std::integral_constant<int, 8>{}); break;
        }
    }
}

} // namespace
