// A stretch of decoder layers in one call, for few tokens on one core of a CPU.
//
// Knows matrices, slots and rotations; knows nothing of rows, drafts or requests. Sums are float32, whatever weights
// and cache are stored in; what is multiplied may be rounded to bfloat16 before. A token's results do not depend on
// which tokens are beside it: every sum has one order.
//
// Shapes: N tokens, D model width.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "compiled_attention.h"
#include "compiled_model.h"
#include "compiled_multiply.h"
#include "compiled_vectors.h"

namespace {

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

// Numbers of `Cached` are kept; `Attended` says how attention takes them.
template <class Weight, class Cached, class Attended>
void run(const Model &model, int64_t first, int64_t last, float *hidden, const Tokens &tokens) {
    const int64_t count = tokens.count, width = model.width, mlp = model.mlp_width;
    const int64_t query_width = model.num_heads * model.head_width;
    const int64_t qkv_width = query_width + 2 * model.num_kv_heads * model.head_width;
    int64_t longest = 0;
    for (int64_t token = 0; token < count; token++) longest = std::max(longest, tokens.position(token) + 1);
    static thread_local std::vector<float> scratch;
    scratch.resize(count * (2 * width + qkv_width + query_width + 2 * mlp) + num_scores(longest));
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
        for (int64_t first_token = 0, end; first_token < count; first_token = end) {
            for (end = first_token + 1; end < count && tokens.rows[end] == tokens.rows[first_token];) end++;
            attend_row<Attended>(model, layer, tokens, first_token, end, qkv, qkv_width, scores, attended);
        }
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

// Where bfloat16 is multiplied as such, it is in attention, too.
template <class Weight>
using Attended = std::conditional_t<std::is_same_v<Weight, Bfloat16Product>, Bfloat16Product, Bfloat16>;

template <class Action> void with_weights(int32_t stored, Action action) {
    switch (stored) {
    case 0: action(float{}); break;
    case 1: action(Bfloat16{}); break;
    case 2: action(Float16{}); break;
#if defined(__AVX512BF16__)
    default: action(Bfloat16Product{}); break;
#else
    default: break;
#endif
    }
}

} // namespace

// Whether this CPU multiplies bfloat16.
extern "C" bool has_bfloat16_products() {
#if defined(__AVX512BF16__)
    return true;
#else
    return false;
#endif
}

extern "C" void run_layers(const Model *model, int64_t first, int64_t last, float *hidden, const Tokens *tokens) {
    with_weights(model->stored, [&](auto weight) {
        if (model->cached == 0)
            run<decltype(weight), float, float>(*model, first, last, hidden, *tokens);
        else
            run<decltype(weight), Bfloat16, Attended<decltype(weight)>>(*model, first, last, hidden, *tokens);
    });
}

namespace {

template <class Stored> void widen(const void *embedding, int64_t id, int64_t width, float *hidden) {
    const Stored *from = static_cast<const Stored *>(embedding) + id * width;
    for (int64_t at = 0; at < width; at += LANES) store(hidden + at, load(from + at));
}

} // namespace

extern "C" void embed(const Model *model, const void *embedding, int64_t id, float *hidden) {
    (model->cached == 0 ? widen<float> : widen<Bfloat16>)(embedding, id, model->width, hidden);
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
