// Attention of one token to the positions of its row, straight from the slots where they lie.
//
// Knows slots and heads; knows nothing of other tokens.
//
// Shapes: H query heads that share a key/value head, F head width, T positions of a row.

#pragma once

#include <algorithm>
#include <type_traits>

#include "compiled_model.h"
#include "compiled_vectors.h"

namespace {

// More query heads than these are taken one set after the other.
constexpr int MOST_HEADS = 4;

// Where a row's keys and values of one key/value head lie.
template <class Cached> struct Context {
    const Cached *keys, *values;
    int64_t slot_width, length;
    const int64_t *slots;

    const Cached *key(int64_t position) const { return keys + slots[position] * slot_width; }
    const Cached *value(int64_t position) const { return values + slots[position] * slot_width; }

    // Slots of a row lie apart: no processor sees the next one coming.
    template <int WIDTH> void prefetch(int64_t position) const {
        constexpr int LINE = 64 / sizeof(Cached);
        const int64_t within = std::min(position, length - 1);
        for (int at = 0; at < WIDTH; at += LINE) {
            __builtin_prefetch(key(within) + at);
            __builtin_prefetch(value(within) + at);
        }
    }

    int64_t padded() const { return (length + LANES - 1) / LANES * LANES; }
};

// A key's products with all heads: it is read once.
template <class Cached, int PARTS, int HEADS>
void score(const float *query_HF, const Context<Cached> &context, float *scores_HT, Floats *bests_H) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(PARTS * LANES));
    const int64_t padded = context.padded();
    Floats query[HEADS][PARTS];
    for (int head = 0; head < HEADS; head++)
        for (int part = 0; part < PARTS; part++) query[head][part] = load(query_HF + (head * PARTS + part) * LANES) * scale;
    for (int64_t position = 0; position < context.length; position += LANES) {
        Floats products[HEADS][LANES];
        for (int lane = 0; lane < LANES; lane++) {
            // Past the end the last position stands in, and is not counted.
            const Cached *key = context.key(std::min(position + lane, context.length - 1));
            context.template prefetch<PARTS * LANES>(position + lane + LANES);
            Floats sums[HEADS] = {};
            for (int part = 0; part < PARTS; part++) {
                const Floats keys = load(key + part * LANES);
                for (int head = 0; head < HEADS; head++) sums[head] += query[head][part] * keys;
            }
            for (int head = 0; head < HEADS; head++) products[head][lane] = sums[head];
        }
        for (int head = 0; head < HEADS; head++) {
            const Floats scores = sum_each(products[head]);
            store(scores_HT + head * padded + position, scores);
            bests_H[head] = scores > bests_H[head] ? scores : bests_H[head];
        }
    }
}

// e to the power of scores, in their place, 0 past the end; returns their sum.
float exponentials(float *scores_T, int64_t length, float best) {
    Floats totals = {};
    for (int64_t position = 0; position < length; position += LANES) {
        const Words is_counted = LANE < static_cast<int32_t>(std::min<int64_t>(LANES, length - position));
        const Floats raised = is_counted ? exponential(load(scores_T + position) - best) : Floats{};
        totals += raised;
        store(scores_T + position, raised);
    }
    return sum(totals);
}

// attended_HF = Σ softmax(query · keys) values. `scores_HT` has room for 16 positions more than there are.
template <class Cached, int PARTS, int HEADS>
void attend_heads(const float *query_HF, const Context<Cached> &context, float *scores_HT, float *attended_HF) {
    const int64_t padded = context.padded();
    Floats bests[HEADS];
    for (int head = 0; head < HEADS; head++) bests[head] = Floats{} - INFINITY;
    score<Cached, PARTS, HEADS>(query_HF, context, scores_HT, bests);
    float wholes[HEADS];
    for (int head = 0; head < HEADS; head++)
        wholes[head] = exponentials(scores_HT + head * padded, context.length, highest(bests[head]));
    Floats sums[HEADS][PARTS] = {};
    for (int64_t position = 0; position < context.length; position++) {
        const Cached *value = context.value(position);
        for (int part = 0; part < PARTS; part++) {
            const Floats values = load(value + part * LANES);
            for (int head = 0; head < HEADS; head++) sums[head][part] += scores_HT[head * padded + position] * values;
        }
    }
    for (int head = 0; head < HEADS; head++)
        for (int part = 0; part < PARTS; part++)
            store(attended_HF + (head * PARTS + part) * LANES, sums[head][part] / wholes[head]);
}

template <class Cached, int PARTS>
void attend_group(const float *query_HF, int64_t num_heads, const Context<Cached> &context, float *scores,
                  float *attended_HF) {
    constexpr int64_t WIDTH = PARTS * LANES;
    for (int64_t head = 0; head < num_heads; head += MOST_HEADS) {
        const float *query = query_HF + head * WIDTH;
        float *attended = attended_HF + head * WIDTH;
        switch (std::min<int64_t>(MOST_HEADS, num_heads - head)) {
        case 1: attend_heads<Cached, PARTS, 1>(query, context, scores, attended); break;
        case 2: attend_heads<Cached, PARTS, 2>(query, context, scores, attended); break;
        case 3: attend_heads<Cached, PARTS, 3>(query, context, scores, attended); break;
        default: attend_heads<Cached, PARTS, 4>(query, context, scores, attended); break;
        }
    }
}

// Numbers that `attend_token` needs room for.
int64_t num_scores(int64_t longest) { return MOST_HEADS * (longest + LANES); }

template <class Cached>
void attend_token(const Model &model, const Layer &layer, const Tokens &tokens, int64_t token, const float *query,
                  float *scores, float *attended) {
    const int64_t width = model.head_width, repeats = model.num_heads / model.num_kv_heads;
    for (int64_t group = 0; group < model.num_kv_heads; group++) {
        const Cached *keys = static_cast<const Cached *>(layer.cache) + group * width;
        const Context<Cached> context{keys, keys + model.num_kv_heads * width, 2 * model.num_kv_heads * width,
                                      tokens.position(token) + 1, tokens.slots(token)};
        const int64_t first = group * repeats * width;
        const auto attend = [&](auto parts) {
            attend_group<Cached, decltype(parts)::value>(query + first, repeats, context, scores, attended + first);
        };
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
