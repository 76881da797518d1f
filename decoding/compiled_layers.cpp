// A stretch of decoder layers in one call, for few tokens on one core of a CPU.
//
// Knows matrices, slots and rotations; knows nothing of rows, drafts or requests. Everything is computed in float32,
// whatever weights and cache are stored in. A token's results do not depend on which tokens are beside it: every sum
// has one order.
//
// Shapes: N tokens, D model width, H query heads, G key/value heads, F head width, I inputs, O outputs.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "compiled_model.h"
#include "compiled_vectors.h"

namespace {

// Panels of 16 outputs: weights[panel][input][16]. Adds nothing to what `out` held.
template <class Weight, int TOKENS, int PANELS>
inline void multiply_block(const float *in_NI, int64_t num_inputs, const Weight *panels, float *out_NO,
                           int64_t out_stride) {
    Floats sums[TOKENS][PANELS] = {};
    for (int64_t input = 0; input < num_inputs; input++) {
        Floats weights[PANELS];
        for (int panel = 0; panel < PANELS; panel++)
            weights[panel] = load(panels + (panel * num_inputs + input) * LANES);
        for (int token = 0; token < TOKENS; token++) {
            const Floats value = Floats{} + in_NI[token * num_inputs + input];
            for (int panel = 0; panel < PANELS; panel++) sums[token][panel] += weights[panel] * value;
        }
    }
    for (int token = 0; token < TOKENS; token++)
        for (int panel = 0; panel < PANELS; panel++)
            store(out_NO + token * out_stride + panel * LANES, sums[token][panel]);
}

template <class Weight, int TOKENS>
void multiply_few(const float *in_NI, int64_t num_inputs, const Weight *panels, int64_t num_panels, float *out_NO) {
    constexpr int WIDE = 4;
    int64_t panel = 0;
    for (; panel + WIDE <= num_panels; panel += WIDE)
        multiply_block<Weight, TOKENS, WIDE>(in_NI, num_inputs, panels + panel * num_inputs * LANES,
                                             out_NO + panel * LANES, num_panels * LANES);
    for (; panel < num_panels; panel++)
        multiply_block<Weight, TOKENS, 1>(in_NI, num_inputs, panels + panel * num_inputs * LANES,
                                          out_NO + panel * LANES, num_panels * LANES);
}

// out_NO = in_NI · weightsᵀ; O is a multiple of 16.
template <class Weight>
void multiply(const float *in_NI, int64_t num_tokens, int64_t num_inputs, const Weight *panels, int64_t num_outputs,
              float *out_NO) {
    const int64_t num_panels = num_outputs / LANES;
    constexpr int MOST = 6;
    for (int64_t token = 0; token < num_tokens;) {
        const float *in = in_NI + token * num_inputs;
        float *out = out_NO + token * num_outputs;
        const int64_t count = std::min<int64_t>(MOST, num_tokens - token);
        switch (count) {
        case 1: multiply_few<Weight, 1>(in, num_inputs, panels, num_panels, out); break;
        case 2: multiply_few<Weight, 2>(in, num_inputs, panels, num_panels, out); break;
        case 3: multiply_few<Weight, 3>(in, num_inputs, panels, num_panels, out); break;
        case 4: multiply_few<Weight, 4>(in, num_inputs, panels, num_panels, out); break;
        case 5: multiply_few<Weight, 5>(in, num_inputs, panels, num_panels, out); break;
        default: multiply_few<Weight, 6>(in, num_inputs, panels, num_panels, out); break;
        }
        token += count;
    }
}

void normalise(const float *in_ND, int64_t num_tokens, int64_t width, const float *weight_D, float eps,
               float *out_ND) {
    for (int64_t token = 0; token < num_tokens; token++) {
        const float *in = in_ND + token * width;
        float *out = out_ND + token * width;
        Floats squares = {};
        for (int64_t place = 0; place < width; place += LANES) squares += load(in + place) * load(in + place);
        const float scale = 1.0f / std::sqrt(sum(squares) / width + eps);
        for (int64_t place = 0; place < width; place += LANES)
            store(out + place, load(in + place) * scale * load(weight_D + place));
    }
}

// One query head of one token: attended_F = Σ softmax(query · keys) values, over `length` positions.
template <class Cached, int PARTS>
void attend_head(const float *query_F, const Cached *layer, int64_t slot_width, int64_t key_at, int64_t value_at,
                 const int64_t *slots, int64_t length, float *scores_T, float *attended_F) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(PARTS * LANES));
    Floats query[PARTS];
    for (int part = 0; part < PARTS; part++) query[part] = load(query_F + part * LANES) * scale;
    float best = -INFINITY;
    for (int64_t position = 0; position < length; position++) {
        const Cached *key = layer + slots[position] * slot_width + key_at;
        Floats products = {};
        for (int part = 0; part < PARTS; part++) products += query[part] * load(key + part * LANES);
        scores_T[position] = sum_pairwise(products);
        best = std::max(best, scores_T[position]);
    }
    const int64_t padded = (length + LANES - 1) / LANES * LANES;
    std::fill(scores_T + length, scores_T + padded, -INFINITY);
    Floats total = {};
    for (int64_t position = 0; position < padded; position += LANES) {
        const Floats raised = exponential(load(scores_T + position) - best);
        total += position + LANES <= length ? raised : Floats{};
        store(scores_T + position, raised);
    }
    float whole = sum(total);
    for (int64_t position = length / LANES * LANES; position < length; position++) whole += scores_T[position];
    Floats sums[PARTS] = {};
    for (int64_t position = 0; position < length; position++) {
        const Cached *value = layer + slots[position] * slot_width + value_at;
        for (int part = 0; part < PARTS; part++) sums[part] += scores_T[position] * load(value + part * LANES);
    }
    for (int part = 0; part < PARTS; part++) store(attended_F + part * LANES, sums[part] / whole);
}

template <class Cached>
void attend_token(const Model &model, const Layer &layer, const Tokens &tokens, int64_t token, const float *query,
                  float *scores, float *attended) {
    const int64_t width = model.head_width, slot_width = 2 * model.num_kv_heads * width;
    const int64_t repeats = model.num_heads / model.num_kv_heads;
    const int64_t *slots = tokens.slots(token), length = tokens.position(token) + 1;
    for (int64_t head = 0; head < model.num_heads; head++) {
        const int64_t key_at = head / repeats * width, value_at = (model.num_kv_heads + head / repeats) * width;
        const auto attend = [&](auto parts) {
            attend_head<Cached, decltype(parts)::value>(query + head * width, static_cast<Cached *>(layer.cache),
                                                        slot_width, key_at, value_at, slots, length, scores,
                                                        attended + head * width);
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

// Rotates queries and keys in place, then stores keys and values.
template <class Cached> void rotate_and_store(const Model &model, const Layer &layer, const Tokens &tokens, float *qkv) {
    const int64_t width = model.head_width, kv_width = model.num_kv_heads * width;
    const int64_t rotated = model.num_heads * width + kv_width, stride = rotated + kv_width;
    for (int64_t token = 0; token < tokens.count; token++) {
        float *own = qkv + token * stride;
        const int64_t position = tokens.position(token);
        const float *turns = tokens.rotations + position * width;
        for (int64_t at = 0; at < rotated; at += 2) {
            const float *turn = turns + at % width;
            const float real = own[at] * turn[0] - own[at + 1] * turn[1];
            own[at + 1] = own[at] * turn[1] + own[at + 1] * turn[0];
            own[at] = real;
        }
        Cached *slot = static_cast<Cached *>(layer.cache) + tokens.slots(token)[position] * 2 * kv_width;
        for (int64_t at = 0; at < 2 * kv_width; at += LANES) store(slot + at, load(own + rotated - kv_width + at));
    }
}

template <class Weight, class Cached>
void run(const Model &model, int64_t first, int64_t last, float *hidden, const Tokens &tokens) {
    const int64_t count = tokens.count, width = model.width, mlp = model.mlp_width;
    const int64_t query_width = model.num_heads * model.head_width;
    const int64_t qkv_width = query_width + 2 * model.num_kv_heads * model.head_width;
    int64_t longest = 0;
    for (int64_t token = 0; token < count; token++) longest = std::max(longest, tokens.position(token) + 1);
    static thread_local std::vector<float> scratch;
    scratch.resize(count * (2 * width + qkv_width + query_width + 2 * mlp) + longest + LANES);
    float *normed = scratch.data(), *added = normed + count * width, *qkv = added + count * width;
    float *attended = qkv + count * qkv_width, *gate_up = attended + count * query_width;
    float *scores = gate_up + count * 2 * mlp;
    const auto add = [&] {
        for (int64_t at = 0; at < count * width; at += LANES) store(hidden + at, load(hidden + at) + load(added + at));
    };
    for (int64_t index = first; index < last; index++) {
        const Layer &layer = model.layers[index];
        normalise(hidden, count, width, layer.attention_norm, model.eps, normed);
        multiply(normed, count, width, static_cast<const Weight *>(layer.qkv), qkv_width, qkv);
        rotate_and_store<Cached>(model, layer, tokens, qkv);
        for (int64_t token = 0; token < count; token++)
            attend_token<Cached>(model, layer, tokens, token, qkv + token * qkv_width, scores,
                                 attended + token * query_width);
        multiply(attended, count, query_width, static_cast<const Weight *>(layer.attention_out), width, added);
        add();
        normalise(hidden, count, width, layer.mlp_norm, model.eps, normed);
        multiply(normed, count, width, static_cast<const Weight *>(layer.gate_up), 2 * mlp, gate_up);
        float *raised = gate_up;
        for (int64_t token = 0; token < count; token++) {
            const float *gate = gate_up + token * 2 * mlp;
            for (int64_t at = 0; at < mlp; at += LANES) {
                const Floats value = load(gate + at), up = load(gate + mlp + at);
                store(raised + token * mlp + at, value / (1.0f + exponential(-value)) * up);
            }
        }
        multiply(raised, count, mlp, static_cast<const Weight *>(layer.down), width, added);
        add();
    }
}

template <class Action> void with_weights(int32_t stored, Action action) {
    switch (stored) {
    case 0: action(float{}); break;
    case 1: action(Bfloat16{}); break;
    default: action(Float16{}); break;
    }
}

} // namespace

extern "C" void run_layers(const Model *model, int64_t first, int64_t last, float *hidden, const Tokens *tokens) {
    with_weights(model->stored, [&](auto weight) {
        if (model->cached == 0)
            run<decltype(weight), float>(*model, first, last, hidden, *tokens);
        else
            run<decltype(weight), Bfloat16>(*model, first, last, hidden, *tokens);
    });
}

extern "C" void head_logits(const Model *model, const float *norm, const void *head, int64_t num_outputs,
                            const float *hidden, int64_t count, float *logits) {
    static thread_local std::vector<float> normed;
    normed.resize(count * model->width);
    normalise(hidden, count, model->width, norm, model->eps, normed.data());
    with_weights(model->stored, [&](auto weight) {
        multiply(normed.data(), count, model->width, static_cast<const decltype(weight) *>(head), num_outputs, logits);
    });
}
