// Products with matrices in panels, for few tokens: each sum has one order, whatever tokens are beside it.
//
// Knows numbers of tokens, inputs and outputs; knows nothing of layers.
//
// Shapes: N tokens, I inputs, O outputs, a multiple of 16.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "compiled_vectors.h"

namespace {

// A panel has 4 vectors of outputs, input by input: weights[panel][input][64]. The last one may be filled up.
constexpr int VECTORS = 4;

// Sums of several panels that are kept in registers beside their weights, 16 lanes each.
#if defined(__AVX512F__)
constexpr int MOST_SUMS = 16;
#else
constexpr int MOST_SUMS = 4;
#endif

constexpr int MOST_TOKENS = 6;
constexpr int MOST_PANELS = 4;

// One token alone is bound by how many sums are under way at once; many are by arithmetic.
constexpr int panels_at_once(int tokens) { return std::clamp(MOST_SUMS / (tokens * VECTORS), 1, MOST_PANELS); }

// How weights of a format meet inputs. `TOGETHER` inputs of an output lie side by side, `Given` is what inputs are
// rounded to, `add` adds the products of 16 outputs with so many inputs.
template <class Weight> struct Products {
    static constexpr int TOGETHER = 1;
    using Given = float;
    using Read = Floats;

    static Read read(const Weight *from) { return load(from); }
    static void add(Floats &sums, Read weights, const float *inputs) { sums += weights * (Floats{} + *inputs); }
};

// Pairs of bfloat16 are words: their halves become floats in one operation each, exactly.
template <> struct Products<Bfloat16> {
    static constexpr int TOGETHER = 2;
    using Given = float;
    struct Read {
        Floats even, odd;
    };

    static Read read(const Bfloat16 *from) {
        Words pairs;
        std::memcpy(&pairs, from, sizeof pairs);
        return {(Floats)(pairs << 16), (Floats)(pairs & static_cast<int32_t>(0xffff0000))};
    }
    static void add(Floats &sums, Read weights, const float *inputs) {
        sums += weights.even * (Floats{} + inputs[0]);
        sums += weights.odd * (Floats{} + inputs[1]);
    }
};

#if defined(__AVX512BF16__)
// Inputs are rounded to bfloat16 as well; products are exact and added up in float32, two at a time.
template <> struct Products<Bfloat16Product> {
    static constexpr int TOGETHER = 2;
    using Given = Bfloat16;
    using Read = __m512bh;

    static Read read(const Bfloat16Product *from) { return (__m512bh)_mm512_loadu_si512(from); }
    static void add(Floats &sums, Read weights, const Bfloat16 *inputs) {
        int32_t pair;
        std::memcpy(&pair, inputs, sizeof pair);
        sums = (Floats)_mm512_dpbf16_ps((__m512)sums, weights, (__m512bh)_mm512_set1_epi32(pair));
    }
};
#endif

template <class Weight> using Given = typename Products<Weight>::Given;

// The first `USED` vectors of each of these panels.
template <class Weight, int TOKENS, int PANELS, int USED>
inline void multiply_block(const Given<Weight> *in_NI, int64_t num_inputs, const Weight *panels, float *out_NO,
                           int64_t out_stride) {
    using Each = Products<Weight>;
    constexpr int STEP = Each::TOGETHER;
    Floats sums[TOKENS][PANELS][USED] = {};
    for (int64_t input = 0; input < num_inputs; input += STEP) {
        const auto read = [&](int panel, int vector) {
            return Each::read(panels + ((panel * num_inputs + input) * VECTORS + vector * STEP) * LANES);
        };
        // One token waits for weights: all are asked for first. Several need the registers for their sums.
        constexpr bool READS_AHEAD = TOKENS == 1 && sizeof(typename Each::Read) == sizeof(Floats);
        typename Each::Read weights[READS_AHEAD ? PANELS : 1][USED];
        if constexpr (READS_AHEAD)
            for (int panel = 0; panel < PANELS; panel++)
                for (int vector = 0; vector < USED; vector++) weights[panel][vector] = read(panel, vector);
        for (int panel = 0; panel < PANELS; panel++)
            for (int vector = 0; vector < USED; vector++) {
                const typename Each::Read own = READS_AHEAD ? weights[READS_AHEAD ? panel : 0][vector] : read(panel, vector);
                for (int token = 0; token < TOKENS; token++)
                    Each::add(sums[token][panel][vector], own, in_NI + token * num_inputs + input);
            }
    }
    for (int token = 0; token < TOKENS; token++)
        for (int panel = 0; panel < PANELS; panel++)
            for (int vector = 0; vector < USED; vector++)
                store(out_NO + token * out_stride + (panel * VECTORS + vector) * LANES, sums[token][panel][vector]);
}

template <class Weight, int TOKENS>
void multiply_few(const Given<Weight> *in_NI, int64_t num_inputs, const Weight *panels, int64_t num_vectors, float *out_NO,
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

// How many of the tokens left are taken together: about as many each time, as one alone takes longest for itself.
int64_t next_together(int64_t num_left) {
    const int64_t num_times = (num_left + MOST_TOKENS - 1) / MOST_TOKENS;
    return (num_left + num_times - 1) / num_times;
}

// Numbers in the format that products take, until the next call.
template <class Wanted> const Wanted *given(const float *values, int64_t count) {
    if constexpr (std::is_same_v<Wanted, float>) {
        return values;
    } else {
        static thread_local std::vector<Wanted> rounded;
        rounded.resize(count);
        for (int64_t at = 0; at < count; at += LANES) store(rounded.data() + at, load(values + at));
        return rounded.data();
    }
}

// out_NO = exact_NI · weightsᵀ. All tokens take a few panels before the next are read: a matrix comes from memory once.
template <class Weight>
void multiply(const float *exact_NI, int64_t num_tokens, int64_t num_inputs, const Weight *panels, int64_t num_outputs,
              float *out_NO) {
    constexpr int64_t STRIP = MOST_PANELS * VECTORS;
    const Given<Weight> *in_NI = given<Given<Weight>>(exact_NI, num_tokens * num_inputs);
    const int64_t num_vectors = num_outputs / LANES;
    for (int64_t vector = 0; vector < num_vectors; vector += STRIP) {
        const Weight *strip = panels + vector * num_inputs * LANES;
        const int64_t width = std::min(STRIP, num_vectors - vector);
        for (int64_t token = 0, count; token < num_tokens; token += count) {
            count = next_together(num_tokens - token);
            const Given<Weight> *in = in_NI + token * num_inputs;
            float *out = out_NO + token * num_outputs + vector * LANES;
            const auto few = [&](auto tokens) {
                multiply_few<Weight, decltype(tokens)::value>(in, num_inputs, strip, width, out, num_outputs);
            };
            switch (count) {
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
