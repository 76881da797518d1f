// The choice rule for rows of logits on a CPU: what `coupling.choose` gives, in one pass over a row's vocabulary.
//
// Knows logits, temperatures, top-p, min-p and the noise; knows nothing of drafts.
//
// Shapes: N rows, V vocabulary.

#include <algorithm>
#include <limits>
#include <vector>

#include "compiled_vectors.h"

namespace {

uint32_t mix(uint32_t x) {
    x ^= x >> 15;
    x *= 0x2C1B3C6Du;
    x ^= x >> 12;
    x *= 0x297A2D39u;
    return x ^ (x >> 15);
}

// The noise's uniform number, rounded as the contract's float32 arithmetic rounds it.
float uniform(uint32_t bits) {
    float u = static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-32f + 0x1p-33f;
    if (u < 0) u += 1.0f;
    return u < 0x1.fffffep-1f ? u : 0x1.fffffep-1f;
}

float gumbel(float u) { return static_cast<float>(-std::log(-std::log1p(-static_cast<double>(u)))); }

// e to the power of less is nothing beside 1, and not chosen by any noise.
constexpr float LEAST_SCORE = -87.0f;

struct Row {
    const float *logits;
    int64_t vocab_size;
    float temperature, top_p, floor;
    uint32_t first, second;
};

// The lowest id of the best logit.
int64_t best_of(const Row &row) {
    const int64_t whole = row.vocab_size / LANES * LANES;
    float best = -INFINITY;
    Floats bests = Floats{} - INFINITY;
    for (int64_t id = 0; id < whole; id += LANES) {
        const Floats logits = load(row.logits + id);
        bests = logits > bests ? logits : bests;
    }
    for (int lane = 0; lane < LANES; lane++) best = std::max(best, bests[lane]);
    for (int64_t id = whole; id < row.vocab_size; id++) best = std::max(best, row.logits[id]);
    const int64_t found = std::find(row.logits, row.logits + row.vocab_size, best) - row.logits;
    return found < row.vocab_size ? found : 0;
}

// Mass of the tokens above a score.
float mass_above(const float *scores, const float *weights, int64_t padded_size, float score) {
    Floats mass = {};
    for (int64_t id = 0; id < padded_size; id += LANES) mass += load(scores + id) > score ? load(weights + id) : Floats{};
    return sum(mass);
}

int64_t choose_row(const Row &row, std::vector<float> &scratch) {
    const int64_t size = row.vocab_size, padded = (size + LANES - 1) / LANES * LANES, top = best_of(row);
    const float best = row.logits[top];
    scratch.resize(3 * padded);
    float *scores = scratch.data(), *weights = scores + padded, *uniforms = weights + padded;
    for (int64_t id = 0; id < size; id++) {
        scores[id] = (row.logits[id] - best) / row.temperature;
        uniforms[id] = uniform(mix((mix(static_cast<uint32_t>(id)) ^ row.first) + row.second));
    }
    std::fill(scores + size, scores + padded, -INFINITY);
    std::fill(uniforms + size, uniforms + padded, 1.0f);
    Floats totals = {};
    const Floats floor = Floats{} + std::max(row.floor, LEAST_SCORE);
    for (int64_t id = 0; id < padded; id += LANES) {
        const Floats weight = load(scores + id) < floor ? Floats{} : exponential(load(scores + id));
        store(weights + id, weight);
        totals += weight;
    }
    const float total = sum(totals);
    const bool is_truncated = row.top_p < 1;
    const float kept_mass = row.top_p * total;
    // Less than this each, all such tokens together are not what top-p leaves.
    const float least = is_truncated ? (1 - row.top_p) * total / size * 0.99f : 0.0f;
    int64_t chosen = top;
    float highest = gumbel(uniforms[top]);
    // A token's noise g is above x only if u < e^-x: its u must be below e^(score - highest), of which e^score is known.
    float bound = std::exp(-highest) * 1.0001f;
    for (int64_t id = 0; id < size; id++) {
        if (!(uniforms[id] < weights[id] * bound) || weights[id] < least) continue;
        const float noised = scores[id] + gumbel(uniforms[id]);
        if (noised < highest || (noised == highest && id >= chosen)) continue;
        if (is_truncated && scores[id] < 0 && !(mass_above(scores, weights, padded, scores[id]) < kept_mass)) continue;
        chosen = id;
        highest = noised;
        bound = std::exp(-highest) * 1.0001f;
    }
    return chosen;
}

} // namespace

// Temperature 0 takes the best logit. `keys` are two words for each row; min-p 0 and top-p 1 filter nothing.
extern "C" void choose_tokens(const float *logits, int64_t count, int64_t vocab_size, int64_t stride,
                              const double *temperatures, const double *top_ps, const double *min_ps,
                              const int32_t *first_keys, const int32_t *second_keys, const int64_t *positions,
                              int64_t *chosen) {
    static thread_local std::vector<float> scratch;
    for (int64_t row = 0; row < count; row++) {
        const uint32_t position = static_cast<uint32_t>(positions[row]);
        Row one{logits + row * stride, vocab_size, 1, static_cast<float>(top_ps[row]), 0, 0, 0};
        if (!(temperatures[row] > 0)) {
            chosen[row] = best_of(one);
            continue;
        }
        one.temperature = std::max(static_cast<float>(temperatures[row]), std::numeric_limits<float>::min());
        one.floor = static_cast<float>(std::log(min_ps[row]));
        one.first = mix(static_cast<uint32_t>(first_keys[row]) + position);
        one.second = mix(static_cast<uint32_t>(second_keys[row]) + position);
        chosen[row] = choose_row(one, scratch);
    }
}
