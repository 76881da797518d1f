// A head for drafts alone, of the tokens seen lately. What it leaves out can cost drafts, never change a token.
//
// Knows panels and places; knows nothing of rows.
//
// Shapes: D model width, R tokens of the head.

#include "compiled_multiply.h"
#include "compiled_step.h"

namespace {

constexpr int64_t PANEL = VECTORS * LANES;

// Between the neighbours it has now, and behind the one seen last.
void move_first(const DraftHead &head, int32_t place) {
    const int32_t last = static_cast<int32_t>(head.num_tokens);
    head.older[head.newer[place]] = head.older[place];
    head.newer[head.older[place]] = head.newer[place];
    head.older[place] = head.older[last];
    head.newer[place] = last;
    head.newer[head.older[place]] = place;
    head.older[last] = place;
}

template <class Weight> void copy_column(const void *from, int64_t id, void *to, int64_t place, int64_t width) {
    const Weight *source = static_cast<const Weight *>(from) + id / PANEL * PANEL * width + id % PANEL;
    Weight *target = static_cast<Weight *>(to) + place / PANEL * PANEL * width + place % PANEL;
    for (int64_t input = 0; input < width; input++) target[input * PANEL] = source[input * PANEL];
}

} // namespace

extern "C" void see_tokens(const Model *model, const Ends *ends, const int64_t *ids, int64_t count) {
    if (!ends->drafts) return;
    const DraftHead &head = *ends->drafts;
    for (int64_t each = 0; each < count; each++) {
        const int64_t id = ids[each];
        int32_t place = head.places[id];
        if (place < 0) {
            place = head.newer[head.num_tokens];
            head.places[head.ids[place]] = -1;
            head.places[id] = place;
            head.ids[place] = static_cast<int32_t>(id);
            (model->stored == 0 ? copy_column<float> : copy_column<Bfloat16>)(ends->head, id, head.panels, place,
                                                                             model->width);
        }
        move_first(head, place);
    }
}
