// Drafts by early exit, all draft steps of a cycle in one call: each feeds what the one before chose.
//
// Knows rows and their last tokens; what a step computes is what the other parts compute when called one by one.
//
// Shapes: B rows, P rows still drafting, D model width, V vocabulary.

#include <algorithm>
#include <vector>

#include "compiled_step.h"
#include "compiled_vectors.h"

namespace {

// How sure a draft is by its margin.
int64_t grade_of(float margin, const Confidence &confidence) {
    int64_t grade = 0;
    while (grade < confidence.num_edges && margin >= confidence.edges[grade]) grade++;
    return grade;
}

// The head that drafts take, and the tokens it is of: null for all.
struct Head {
    const void *panels;
    int64_t num_outputs, num_tokens;
    const int32_t *ids;

    explicit Head(const Ends &ends)
        : panels(ends.drafts ? ends.drafts->panels : ends.head),
          num_outputs(ends.drafts ? ends.drafts->num_tokens : ends.num_outputs),
          num_tokens(ends.drafts ? ends.drafts->num_tokens : ends.vocab_size), ids(ends.drafts ? ends.drafts->ids : nullptr) {}
};

} // namespace

extern "C" void choose_drafts(const Model *model, const Ends *ends, const Rows *rows, const Confidence *confidence,
                              const float *hidden, int64_t count, const int64_t *own, const int64_t *positions,
                              int64_t *ids, int64_t *grades) {
    static thread_local std::vector<float> logits;
    const Head head(*ends);
    logits.resize(count * head.num_outputs);
    head_logits(model, ends->norm, head.panels, head.num_outputs, hidden, count, logits.data());
    for (int64_t each = 0; each < count; each++) {
        const int64_t row = own[each];
        float margin;
        choose_tokens(logits.data() + each * head.num_outputs, head.ids, 1, head.num_tokens, head.num_outputs,
                      rows->temperatures + row, rows->top_ks + row, rows->top_ps + row, rows->min_ps + row, rows->first_keys + row,
                      rows->second_keys + row, positions + each, ids + each, &margin);
        grades[each] = grade_of(margin, *confidence);
    }
}

extern "C" void draft_tokens(const Model *model, const Ends *ends, const Rows *rows, const Confidence *confidence,
                             const Drafting *drafting) {
    const int64_t width = model->width, num_rows = rows->count, num_grades = confidence->num_edges + 1;
    static thread_local std::vector<int64_t> places;
    static thread_local std::vector<float> chances;
    places.resize(4 * num_rows);
    chances.assign(num_rows, 1.0f);
    int64_t *own = places.data(), *steps = own + num_rows, *fed = steps + num_rows, *next = fed + num_rows;
    int64_t num_drafting = 0, *ids = drafting->ids, *grades = drafting->grades;
    float *exits = drafting->exits;
    for (int64_t row = 0; row < num_rows; row++) {
        drafting->num_made[row] = 0;
        fed[row] = drafting->last_ids[row];
        if (drafting->lengths[row] > 0) own[num_drafting++] = row;
    }
    for (int64_t step = 0; num_drafting > 0; step++) {
        const Tokens tokens{num_drafting,   rows->context_width, own,           steps, rows->num_computed,
                            rows->contexts, ends->rotations};
        for (int64_t each = 0; each < num_drafting; each++) {
            steps[each] = step;
            next[each] = tokens.position(each) + 1;
            embed(model, ends->embedding, fed[own[each]], exits + each * width);
        }
        run_layers(model, 0, drafting->exit_layer, exits, &tokens);
        choose_drafts(model, ends, rows, confidence, exits, num_drafting, own, next, ids, grades);
        int64_t num_going_on = 0;
        for (int64_t each = 0; each < num_drafting; each++) {
            const int64_t row = own[each];
            fed[row] = ids[each];
            chances[row] *= confidence->chances[(rows->temperatures[row] > 0) * num_grades + grades[each]];
            drafting->num_made[row]++;
            if (step + 1 < drafting->lengths[row] && !(chances[row] < drafting->least[row])) own[num_going_on++] = row;
        }
        ids += num_drafting;
        grades += num_drafting;
        exits += num_drafting * width;
        num_drafting = num_going_on;
    }
}
