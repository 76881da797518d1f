// What the compiled parts are given, and what they give each other.
//
// Knows where matrices, slots and numbers lie; computes nothing.

#pragma once

#include <cstdint>

struct Layer {
    const float *attention_norm;
    const void *qkv;
    const void *attention_out;
    const float *mlp_norm;
    const void *gate_up;
    const void *down;
    void *cache;
};

struct Model {
    int64_t width, num_heads, num_kv_heads, head_width, mlp_width, num_layers;
    float eps;
    int32_t stored;
    int32_t cached;
    const Layer *layers;
};

// Token n is of row `rows[n]`, `steps[n]` positions behind the `num_computed` ones that its row has in the cache.
// `contexts` are the slots of each row's positions, `rotations` the cosines and sines of each position.
struct Tokens {
    int64_t count, context_width;
    const int64_t *rows, *steps, *num_computed, *contexts;
    const float *rotations;

    int64_t position(int64_t token) const { return num_computed[rows[token]] + steps[token]; }
    const int64_t *slots(int64_t token) const { return contexts + rows[token] * context_width; }
};

extern "C" {
// Layers first … last − 1, in place.
void run_layers(const Model *model, int64_t first, int64_t last, float *hidden, const Tokens *tokens);

// A token's residual stream before any layer.
void embed(const Model *model, const void *embedding, int64_t id, float *hidden);

void head_logits(const Model *model, const float *norm, const void *head, int64_t num_outputs, const float *hidden,
                 int64_t count, float *logits);

void choose_tokens(const float *logits, const int32_t *ids, int64_t count, int64_t vocab_size, int64_t stride,
                   const double *temperatures, const int64_t *top_ks, const double *top_ps, const double *min_ps, const int32_t *first_keys, const int32_t *second_keys,
                   const int64_t *positions, int64_t *chosen, float *margins);
}
