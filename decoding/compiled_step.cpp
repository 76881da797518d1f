// One step of a batch in one call: drafts, one pass over all that must be computed, choices, and what of them is kept.
//
// Knows in which order tokens join the stack; what layers, heads and choices compute is decided elsewhere.
//
// Shapes: B rows, N tokens of the pass, K drafts of a row, D model width, V vocabulary.

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "compiled_step.h"

namespace {

// Logits of so many choices lie in a near cache.
constexpr int64_t CHOSEN_AT_ONCE = 12;

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Tokens of a pass: `rows[n]` and `steps[n]` say which, `hidden_ND` what enters the next layer.
struct Pass {
    std::vector<int64_t> rows, steps;
    std::vector<float> hidden;

    void clear() {
        rows.clear();
        steps.clear();
        hidden.clear();
    }

    // Room for the hidden state of one more token.
    float *add(int64_t row, int64_t step, int64_t width) {
        rows.push_back(row);
        steps.push_back(step);
        hidden.resize(hidden.size() + width);
        return hidden.data() + hidden.size() - width;
    }

    void run(const Model *model, const Ends *ends, const Rows *own, int64_t first, int64_t last) {
        const Tokens tokens{static_cast<int64_t>(rows.size()), own->context_width, rows.data(), steps.data(),
                            own->num_computed, own->contexts, ends->rotations};
        run_layers(model, first, last, hidden.data(), &tokens);
    }
};

// Where row b's drafts lie among those of all rows, one after the other: `places[firsts[b] + k]`.
struct Places {
    std::vector<int64_t> firsts, places;

    void find(const Rows &rows, const int64_t *num_made) {
        firsts.assign(rows.count, 0);
        std::partial_sum(num_made, num_made + rows.count - 1, firsts.begin() + 1);
        places.resize(firsts.back() + num_made[rows.count - 1]);
        const int64_t most = *std::max_element(num_made, num_made + rows.count);
        int64_t place = 0;
        for (int64_t ahead = 0; ahead < most; ahead++)
            for (int64_t row = 0; row < rows.count; row++)
                if (ahead < num_made[row]) places[firsts[row] + ahead] = place++;
    }

    int64_t of(int64_t row, int64_t ahead) const { return places[firsts[row] + ahead]; }
};

// What a draft of each row that chooses would be, after so many layers, and how sure it would be.
void choose_surveyed(const Model *model, const Ends *ends, const Rows *rows, const Confidence *confidence,
                     const Step *step, const Pass &pass, int64_t *ids, int64_t *grades) {
    static thread_local Pass last;
    static thread_local std::vector<int64_t> positions;
    last.clear();
    positions.clear();
    int64_t token = 0;
    for (int64_t row = 0; row < rows->count; row++) {
        const int64_t last_known = step->num_fed[row] - step->num_looked_up[row] - 1;
        std::copy_n(pass.hidden.data() + (token + last_known) * model->width, model->width,
                    last.add(row, last_known, model->width));
        positions.push_back(rows->num_computed[row] + last_known + 1);
        token += step->num_fed[row];
    }
    choose_drafts(model, ends, rows, confidence, last.hidden.data(), rows->count, last.rows.data(), positions.data(), ids,
                  grades);
}

// The last draft of each row, and all that is fed to the others, up to where drafts left; then all tokens together.
template <class Survey>
void pass_all(const Model *model, const Ends *ends, const Rows *rows, const Drafting &drafts, const Places &places,
              const Step *step, Pass &pass, Survey survey) {
    static thread_local Pass entering;
    const int64_t width = model->width, *id = step->fed_ids;
    bool any_made = false;
    entering.clear();
    for (int64_t row = 0; row < rows->count; row++) {
        const int64_t num_fed = step->num_fed[row], num_made = drafts.num_made[row];
        if (num_made > 0) {
            any_made = true;
            embed(model, ends->embedding, drafts.ids[places.of(row, num_made - 1)], entering.add(row, num_made, width));
        } else {
            for (int64_t each = 0; each < num_fed; each++)
                embed(model, ends->embedding, id[each], entering.add(row, each, width));
        }
        id += num_fed;
    }
    if (!any_made) {
        std::swap(pass, entering);
        int64_t first = 0;
        for (int64_t each = 0; each < step->num_surveyed; each++) {
            pass.run(model, ends, rows, first, step->surveyed[each]);
            first = step->surveyed[each];
            survey();
        }
        pass.run(model, ends, rows, first, model->num_layers);
        return;
    }
    entering.run(model, ends, rows, 0, drafts.exit_layer);
    pass.clear();
    const float *entered = entering.hidden.data();
    for (int64_t row = 0; row < rows->count; row++) {
        const int64_t num_made = drafts.num_made[row], num_entered = num_made > 0 ? 1 : step->num_fed[row];
        for (int64_t ahead = 0; ahead < num_made; ahead++)
            std::copy_n(drafts.exits + places.of(row, ahead) * width, width, pass.add(row, ahead, width));
        for (int64_t each = 0; each < num_entered; each++, entered += width)
            std::copy_n(entered, width, pass.add(row, num_made + each, width));
    }
    pass.run(model, ends, rows, drafts.exit_layer, model->num_layers);
}

// The full model's choice behind each of these tokens.
void choose_behind(const Model *model, const Ends *ends, const Rows *rows, const Pass &pass,
                   const std::vector<int64_t> &tokens, int64_t *chosen) {
    static thread_local std::vector<float> hidden, logits;
    const int64_t width = model->width, count = tokens.size(), stride = ends->num_outputs;
    hidden.resize(CHOSEN_AT_ONCE * width);
    logits.resize(CHOSEN_AT_ONCE * stride);
    for (int64_t first = 0; first < count; first += CHOSEN_AT_ONCE) {
        const int64_t together = std::min(CHOSEN_AT_ONCE, count - first);
        for (int64_t each = 0; each < together; each++)
            std::copy_n(pass.hidden.data() + tokens[first + each] * width, width, hidden.data() + each * width);
        head_logits(model, ends->norm, ends->head, stride, hidden.data(), together, logits.data());
        for (int64_t each = 0; each < together; each++) {
            const int64_t token = tokens[first + each], row = pass.rows[token];
            const int64_t position = rows->num_computed[row] + pass.steps[token] + 1;
            choose_tokens(logits.data() + each * stride, nullptr, 1, ends->vocab_size, stride, rows->temperatures + row,
                          rows->top_ks + row, rows->top_ps + row, rows->min_ps + row, rows->first_keys + row, rows->second_keys + row,
                          &position, chosen + first + each, nullptr);
        }
    }
}

} // namespace

extern "C" void run_step(const Model *model, const Ends *ends, const Rows *rows, const Confidence *confidence,
                         const Drafting *drafting, const Step *step) {
    static thread_local std::vector<float> exits;
    static thread_local std::vector<int64_t> choosing, choices, surveyed;
    static thread_local Places places;
    static thread_local Pass pass;
    const double started = seconds_now();
    exits.resize(std::accumulate(drafting->lengths, drafting->lengths + rows->count, int64_t{0}) * model->width);
    Drafting drafts = *drafting;
    drafts.exits = exits.data();
    draft_tokens(model, ends, rows, confidence, &drafts);
    const double drafted = seconds_now();
    places.find(*rows, drafts.num_made);
    surveyed.resize(step->num_surveyed * rows->count);
    int64_t num_surveyed = 0;
    pass_all(model, ends, rows, drafts, places, step, pass, [&] {
        const int64_t at = rows->count * num_surveyed++;
        choose_surveyed(model, ends, rows, confidence, step, pass, surveyed.data() + at, step->grades + at);
    });
    choosing.clear();
    for (int64_t token = 0; token < static_cast<int64_t>(pass.rows.size()); token++) {
        const int64_t row = pass.rows[token];
        const int64_t last_known = step->num_fed[row] - step->num_looked_up[row] - 1;
        if (step->chooses[row] && pass.steps[token] >= last_known) choosing.push_back(token);
    }
    choices.resize(choosing.size());
    choose_behind(model, ends, rows, pass, choosing, choices.data());
    const int64_t *choice = choices.data(), *fed = step->fed_ids;
    for (int64_t row = 0; row < rows->count; row++) {
        const int64_t num_made = drafts.num_made[row], num_looked_up = step->num_looked_up[row];
        const int64_t *looked_up = fed + step->num_fed[row] - num_looked_up;
        const int64_t num_drafts = num_made + num_looked_up;
        fed += step->num_fed[row];
        step->num_chosen[row] = 0;
        if (!step->chooses[row]) continue;
        int64_t kept = 0;
        while (kept < num_drafts &&
               choice[kept] == (num_made > 0 ? drafts.ids[places.of(row, kept)] : looked_up[kept]))
            kept++;
        for (int64_t each = 0; each < num_surveyed; each++)
            step->agreed[each * rows->count + row] = surveyed[each * rows->count + row] == choice[0];
        std::copy_n(choice, kept + 1, step->chosen + row * step->most_chosen);
        step->num_chosen[row] = kept + 1;
        choice += num_drafts + 1;
    }
    see_tokens(model, ends, step->fed_ids, fed - step->fed_ids);
    see_tokens(model, ends, choices.data(), choices.size());
    step->seconds[0] = drafted - started;
    step->seconds[1] = seconds_now() - drafted;
}
