// The choice rule for rows of logits on a CPU: what `coupling.choose` gives, in one pass over a row's vocabulary.
//
// Knows logits, temperatures, top-k, top-p, min-p and the noise; knows nothing of drafts.
//
// Shapes: N rows, V vocabulary.

#include <algorithm>
#include <functional>
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

// Logits are of all tokens, or of those with these `ids`.
struct Row {
    const float *logits;
    const int32_t *ids;
    int64_t vocab_size;
    float temperature, top_p, floor;
    int64_t top_k;
    uint32_t first, second;
};

// A token, and how far its score is above the next one's.
struct Chosen {
    int64_t id;
    float margin;
};

// The lowest id of the best logit.
Chosen best_of(const Row &row) {
    const int64_t whole = row.vocab_size / LANES * LANES;
    float best = -INFINITY, next = -INFINITY;
    const auto meet = [&](float logit) {
        next = std::max(next, std::min(best, logit));
        best = std::max(best, logit);
    };
    Floats bests = Floats{} - INFINITY, nexts = bests;
    for (int64_t id = 0; id < whole; id += LANES) {
        const Floats logits = load(row.logits + id);
        const Floats lower = logits > bests ? bests : logits;
        nexts = lower > nexts ? lower : nexts;
        bests = logits > bests ? logits : bests;
    }
    for (int lane = 0; lane < LANES; lane++) {
        meet(bests[lane]);
        meet(nexts[lane]);
    }
    for (int64_t id = whole; id < row.vocab_size; id++) meet(row.logits[id]);
    const int64_t found = std::find(row.logits, row.logits + row.vocab_size, best) - row.logits;
    return {found < row.vocab_size ? found : 0, best - next};
}

// Mass of the tokens above a score.
float mass_above(const float *scores, const float *weights, int64_t padded_size, float score) {
    Floats mass = {};
    for (int64_t id = 0; id < padded_size; id += LANES) mass += load(scores + id) > score ? load(weights + id) : Floats{};
    return sum(mass);
}

// What top-k leaves: scores from `least` on, and the mass of the k best.
struct Left {
    float least, total;
};

Left keep_best(const float *scores, const float *weights, int64_t size, int64_t count, float *copy) {
    std::copy_n(scores, size, copy);
    std::nth_element(copy, copy + count - 1, copy + size, std::greater<float>());
    Left left{copy[count - 1], 0};
    // Of equal scores all stay, but only so many count.
    int64_t num_better = 0;
    float weight = 0;
    for (int64_t id = 0; id < size; id++) {
        if (scores[id] > left.least) {
            left.total += weights[id];
            num_better++;
        } else if (scores[id] == left.least) {
            weight = weights[id];
        }
    }
    left.total += (count - num_better) * weight;
    return left;
}

// The margin costs a little: without it the second best need not be known.
Chosen choose_row(const Row &row, bool with_margin, std::vector<float> &scratch) {
    const int64_t size = row.vocab_size, padded = (size + LANES - 1) / LANES * LANES, top = best_of(row).id;
    const float best = row.logits[top];
    scratch.resize(4 * padded);
    float *scores = scratch.data(), *weights = scores + padded, *uniforms = weights + padded, *copy = uniforms + padded;
    for (int64_t id = 0; id < size; id++) {
        scores[id] = (row.logits[id] - best) / row.temperature;
        const int64_t token = row.ids ? row.ids[id] : id;
        uniforms[id] = uniform(mix((mix(static_cast<uint32_t>(token)) ^ row.first) + row.second));
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
    Left left{-INFINITY, sum(totals)};
    if (row.top_k > 0 && row.top_k < size) left = keep_best(scores, weights, size, row.top_k, copy);
    const float total = left.total;
    const bool is_truncated = row.top_p < 1;
    const float kept_mass = row.top_p * total;
    // Less than this each, all such tokens together are not what top-p leaves.
    const float least = is_truncated ? (1 - row.top_p) * total / size * 0.99f : 0.0f;
    int64_t chosen = top;
    float highest = gumbel(uniforms[top]), next = -INFINITY;
    // A token's noise g is above x only if u < e^-x: its u must be below e^(score - x), of which e^score is known.
    const auto bound_of = [](float noised) { return std::exp(-noised) * 1.0001f; };
    float bound = bound_of(with_margin ? next : highest);
    // What top-p leaves out and what it leaves, as far as was asked.
    float out = -INFINITY, in = is_truncated ? 0.0f : -INFINITY;
    const auto is_left = [&](float score) {
        if (score >= in) return true;
        const bool is_in = mass_above(scores, weights, padded, score) < kept_mass;
        (is_in ? in : out) = score;
        return is_in;
    };
    for (int64_t id = 0; id < size; id++) {
        if (!(uniforms[id] < weights[id] * bound) || weights[id] < least || scores[id] <= out || scores[id] < left.least || id == top)
            continue;
        const float noised = scores[id] + gumbel(uniforms[id]);
        const bool is_best = noised > highest || (noised == highest && id < chosen);
        if ((!is_best && !(with_margin && noised > next)) || !is_left(scores[id])) continue;
        next = is_best ? highest : noised;
        if (is_best) {
            chosen = id;
            highest = noised;
        }
        bound = bound_of(with_margin ? next : highest);
    }
    return {chosen, highest - next};
}

} // namespace

// Temperature 0 takes the best logit. `keys` are two words for each row; top-k 0, min-p 0 and top-p 1 filter nothing.
// `ids` and `margins` may be null.
extern "C" void choose_tokens(const float *logits, const int32_t *ids, int64_t count, int64_t vocab_size,
                              int64_t stride, const double *temperatures, const int64_t *top_ks, const double *top_ps,
                              const double *min_ps,
                              const int32_t *first_keys, const int32_t *second_keys, const int64_t *positions,
                              int64_t *chosen, float *margins) {
    static thread_local std::vector<float> scratch;
    for (int64_t row = 0; row < count; row++) {
        const uint32_t position = static_cast<uint32_t>(positions[row]);
        Row one{logits + row * stride, ids, vocab_size, 1, static_cast<float>(top_ps[row]), 0, top_ks[row], 0, 0};
        Chosen found;
        if (!(temperatures[row] > 0)) {
            found = best_of(one);
        } else {
            one.temperature = std::max(static_cast<float>(temperatures[row]), std::numeric_limits<float>::min());
            one.floor = static_cast<float>(std::log(min_ps[row]));
            one.first = mix(static_cast<uint32_t>(first_keys[row]) + position);
            one.second = mix(static_cast<uint32_t>(second_keys[row]) + position);
            found = choose_row(one, margins != nullptr, scratch);
        }
        chosen[row] = ids ? ids[found.id] : found.id;
        if (margins) margins[row] = found.margin;
    }
}
