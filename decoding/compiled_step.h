// What one step of a batch is given and what it gives, where nothing of it needs more than compiled code does.
//
// Knows rows, drafts and where numbers lie; computes nothing.
//
// Shapes: B rows, N tokens fed, M drafts of all rows, K the most of one row, Q = N + M choices at most.

#pragma once

#include <cstdint>

#include "compiled_model.h"

// How sure drafts are: grade g of a margin is how many of `num_edges` edges it reaches. A draft of that grade is kept
// with probability `chances[g]`, behind num_edges + 1 such of rows at temperature 0 those of the others.
struct Confidence {
    int64_t num_edges;
    const float *edges, *chances;
};

// What rows are told apart by: row b has computed its first `num_computed[b]` tokens, and is sampled by its columns.
struct Rows {
    int64_t count, context_width;
    const int64_t *num_computed, *contexts;
    const double *temperatures;
    const int64_t *top_ks;
    const double *top_ps, *min_ps;
    const int32_t *first_keys, *second_keys;
};

// A head for drafts alone: of the tokens seen lately, `num_tokens` of them, in panels as the whole one is. Token
// `ids[place]` stands at `places[id]`, −1 if nowhere. Places are linked from the one seen last, behind number
// `num_tokens`, to the one not seen for longest.
struct DraftHead {
    int64_t num_tokens;
    void *panels;
    int32_t *ids, *places, *older, *newer;
};

// The matrices that every layer is without. Embeddings are stored as keys and values are; drafts may have no head of
// their own.
struct Ends {
    int64_t vocab_size, num_outputs;
    const void *embedding;
    const float *rotations, *norm;
    const void *head;
    const DraftHead *drafts;
};

// Row b drafts `lengths[b]` tokens behind `last_ids[b]` at one exit layer, or fewer: it stops behind a draft with which
// the chance that all of its drafts are kept falls below `least[b]`. Drafts, their grades, the rows they are of and
// the hidden states they were made of lie step after step, in the order of rows; row b made `num_made[b]`.
struct Drafting {
    int64_t exit_layer;
    const int64_t *lengths, *last_ids;
    const float *least;
    int64_t *ids, *grades, *num_made;
    float *exits;
};

// Row b is fed `num_fed[b]` ids, of which the last `num_looked_up[b]` are drafts, and chooses behind its last known
// token and each of its drafts, if at all. `chosen[b][..]` holds `num_chosen[b]` tokens: the drafts that stand and the
// next one. Seconds are those of drafting and of the rest. Where nobody drafts by early exit, `agreed[s][b]` says
// whether row b's next token is what a draft at exit layer `surveyed[s]` would be, and `grades[s][b]` how sure that is.
struct Step {
    int64_t most_chosen, num_surveyed;
    const int64_t *fed_ids, *num_fed, *num_looked_up;
    const bool *chooses;
    const int64_t *surveyed;
    int64_t *num_chosen, *chosen, *grades;
    bool *agreed;
    double *seconds;
};

extern "C" {
// These tokens came: from now on drafts may be these.
void see_tokens(const Model *model, const Ends *ends, const int64_t *ids, int64_t count);

// `exits` have room for as many as drafts are asked for.
void draft_tokens(const Model *model, const Ends *ends, const Rows *rows, const Confidence *confidence,
                  const Drafting *drafting);

// The tokens that a draft's head gives hidden states, of these rows and positions, and how sure they are.
void choose_drafts(const Model *model, const Ends *ends, const Rows *rows, const Confidence *confidence,
                   const float *hidden, int64_t count, const int64_t *own, const int64_t *positions, int64_t *ids,
                   int64_t *grades);

// Drafts, verifies and keeps. The `exits` of drafting are not looked at.
void run_step(const Model *model, const Ends *ends, const Rows *rows, const Confidence *confidence,
              const Drafting *drafting, const Step *step);
}
