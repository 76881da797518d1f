// Drafts by early exit, all draft steps of a cycle in one call: each feeds what the one before chose.
//
// Knows rows and their last tokens; what a step computes is what the other parts compute when called one by one.
//
// Shapes: B rows, K draft steps, M drafts of all steps, D model width, V vocabulary.

#include <algorithm>
#include <numeric>
#include <vector>

#include "compiled_model.h"

// The first `num_rows[k]` rows draft in step k, never more than in the step before. Row b has computed its first
// `num_computed[b]` tokens, and `last_ids[b]` comes next. Drafts and exit hiddens lie step after step.
struct Drafting {
    int64_t num_steps, exit_layer, vocab_size, num_outputs, context_width;
    const int64_t *num_rows, *last_ids, *num_computed, *contexts;
    const float *embedding, *rotations, *norm;
    const void *head;
    const double *temperatures, *top_ps, *min_ps;
    const int32_t *first_keys, *second_keys;
    int64_t *ids;
    float *exits;
};

extern "C" void draft_tokens(const Model *model, const Drafting *drafting) {
    const int64_t width = model->width, most = drafting->num_rows[0];
    static thread_local std::vector<int64_t> places;
    static thread_local std::vector<float> logits;
    places.resize(3 * most);
    logits.resize(most * drafting->num_outputs);
    int64_t *rows = places.data(), *steps = rows + most, *next = steps + most;
    std::iota(rows, rows + most, 0);
    const int64_t *fed = drafting->last_ids;
    int64_t *ids = drafting->ids;
    float *exits = drafting->exits;
    for (int64_t step = 0; step < drafting->num_steps; step++) {
        const int64_t num_rows = drafting->num_rows[step];
        const Tokens tokens{num_rows,           drafting->context_width, rows, steps, drafting->num_computed,
                            drafting->contexts, drafting->rotations};
        for (int64_t row = 0; row < num_rows; row++) {
            steps[row] = step;
            next[row] = tokens.position(row) + 1;
            std::copy_n(drafting->embedding + fed[row] * width, width, exits + row * width);
        }
        run_layers(model, 0, drafting->exit_layer, exits, &tokens);
        head_logits(model, drafting->norm, drafting->head, drafting->num_outputs, exits, num_rows, logits.data());
        choose_tokens(logits.data(), num_rows, drafting->vocab_size, drafting->num_outputs, drafting->temperatures,
                      drafting->top_ps, drafting->min_ps, drafting->first_keys, drafting->second_keys, next, ids);
        fed = ids;
        ids += num_rows;
        exits += num_rows * width;
    }
}
