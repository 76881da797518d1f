// What attention is made of: queries, and where keys and values of their row lie.
//
// Knows slots and heads; computes nothing.

#pragma once

#include <algorithm>

#include "compiled_model.h"
#include "compiled_vectors.h"

namespace {

// A key is read once for so many queries.
constexpr int MOST_QUERIES = 9;

// One head of one token: it attends to the first `length` positions of its row.
struct Query {
    const float *query;
    float *attended;
    int64_t length;
};

// Where a row's keys and values of one key/value head lie.
template <class Cached> struct Context {
    const Cached *keys, *values;
    int64_t slot_width;
    const int64_t *slots;

    const Cached *key(int64_t position) const { return keys + slots[position] * slot_width; }
    const Cached *value(int64_t position) const { return values + slots[position] * slot_width; }

    // Slots of a row lie apart: no processor sees the next one coming.
    template <int WIDTH> void prefetch(int64_t position) const {
        constexpr int LINE = 64 / sizeof(Cached);
        for (int at = 0; at < WIDTH; at += LINE) {
            __builtin_prefetch(key(position) + at);
            __builtin_prefetch(value(position) + at);
        }
    }
};

int64_t padded(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

} // namespace
