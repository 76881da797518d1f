// Products with matrices in panels, for few tokens: each sum has one order, whatever tokens are beside it.
//
// Knows numbers of tokens, inputs and outputs; knows nothing of layers.
//
// Shapes: N tokens, I inputs, O outputs, a multiple of 16.

#pragma once

#include <algorithm>

#include "compiled_vectors.h"

namespace {

// A panel has 4 vectors of outputs, input by input: weights[panel][input][64]. The last one may be filled up.
constexpr int VECTORS = 4;

// Sums that are kept in registers, 16 lanes each.
#if defined(__AVX512F__)
constexpr int MOST_SUMS = 24;
#else
constexpr int MOST_SUMS = 4;
#endif

constexpr int MOST_TOKENS = 6;
constexpr int MOST_PANELS = 4;

// One token alone is bound by how many sums are under way at once; many are by arithmetic.
constexpr int panels_at_once(int tokens) { return std::clamp(MOST_SUMS / (tokens * VECTORS), 1, MOST_PANELS); }

// The first `USED` vectors of each of these panels.
template <class Weight, int TOKENS, int PANELS, int USED>
inline void multiply_block(const float *in_NI, int64_t num_inputs, const Weight *panels, float *out_NO,
                           int64_t out_stride) {
    Floats sums[TOKENS][PANELS][USED] = {};
    for (int64_t input = 0; input < num_inputs; input++) {
        Floats weights[PANELS][USED];
        for (int panel = 0; panel < PANELS; panel++)
            for (int vector = 0; vector < USED; vector++)
                weights[panel][vector] =
                    load(panels + ((panel * num_inputs + input) * VECTORS + vector) * LANES);
        for (int token = 0; token < TOKENS; token++) {
            const Floats value = Floats{} + in_NI[token * num_inputs + input];
            for (int panel = 0; panel < PANELS; panel++)
                for (int vector = 0; vector < USED; vector++)
                    sums[token][panel][vector] += weights[panel][vector] * value;
        }
    }
    for (int token = 0; token < TOKENS; token++)
        for (int panel = 0; panel < PANELS; panel++)
            for (int vector = 0; vector < USED; vector++)
                store(out_NO + token * out_stride + (panel * VECTORS + vector) * LANES, sums[token][panel][vector]);
}

template <class Weight, int TOKENS>
void multiply_few(const float *in_NI, int64_t num_inputs, const Weight *panels, int64_t num_vectors, float *out_NO,
                  int64_t out_stride) {
    constexpr int WIDE = panels_at_once(TOKENS);
    const int64_t size = num_inputs * VECTORS * LANES, num_panels = num_vectors / VECTORS;
    int64_t panel = 0;
    for (; panel + WIDE <= num_panels; panel += WIDE)
        multiply_block<Weight, TOKENS, WIDE, VECTORS>(in_NI, num_inputs, panels + panel * size,
                                                      out_NO + panel * VECTORS * LANES, out_stride);
    for (; panel < num_panels; panel++)
        multiply_block<Weight, TOKENS, 1, VECTORS>(in_NI, num_inputs, panels + panel * size,
                                                   out_NO + panel * VECTORS * LANES, out_stride);
    panels += panel * size;
    out_NO += panel * VECTORS * LANES;
    switch (num_vectors % VECTORS) {
    case 1: multiply_block<Weight, TOKENS, 1, 1>(in_NI, num_inputs, panels, out_NO, out_stride); break;
    case 2: multiply_block<Weight, TOKENS, 1, 2>(in_NI, num_inputs, panels, out_NO, out_stride); break;
    case 3: multiply_block<Weight, TOKENS, 1, 3>(in_NI, num_inputs, panels, out_NO, out_stride); break;
    default: break;
    }
}

// out_NO = in_NI · weightsᵀ. All tokens take a few panels before the next are read: a matrix comes from memory once.
template <class Weight>
void multiply(const float *in_NI, int64_t num_tokens, int64_t num_inputs, const Weight *panels, int64_t num_outputs,
              float *out_NO) {
    constexpr int64_t STRIP = MOST_PANELS * VECTORS;
    const int64_t num_vectors = num_outputs / LANES;
    for (int64_t vector = 0; vector < num_vectors; vector += STRIP) {
        const Weight *strip = panels + vector * num_inputs * LANES;
        const int64_t width = std::min(STRIP, num_vectors - vector);
        for (int64_t token = 0; token < num_tokens; token += MOST_TOKENS) {
            const float *in = in_NI + token * num_inputs;
            float *out = out_NO + token * num_outputs + vector * LANES;
            const auto few = [&](auto tokens) {
                multiply_few<Weight, decltype(tokens)::value>(in, num_inputs, strip, width, out, num_outputs);
            };
            switch (std::min<int64_t>(MOST_TOKENS, num_tokens - token)) {
            case 1: few(std::integral_constant<int, 1>{}); break;
            case 2: few(std::integral_constant<int, 2>{}); break;
            case 3: few(std::integral_constant<int, 3>{}); break;
            case 4: few(std::integral_constant<int, 4>{}); break;
            case 5: few(std::integral_constant<int, 5>{}); break;
            default: few(std::integral_constant<int, 6>{}); break;
            }
        }
    }
}

} // namespace
