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

// Of so many inputs that lie side by side the numbers of one output.
template <class Number, int TOGETHER>
void copy_column(const void *from, int64_t id, void *to, int64_t place, int64_t width) {
    struct Numbers {
        Number of[TOGETHER];
    };
    const Numbers *source = static_cast<const Numbers *>(from) + (id / PANEL * width / TOGETHER) * PANEL + id % PANEL;
    Numbers *target = static_cast<Numbers *>(to) + (place / PANEL * width / TOGETHER) * PANEL + place % PANEL;
    for (int64_t input = 0; input < width / TOGETHER; input++) target[input * PANEL] = source[input * PANEL];
}

void copy_column(int32_t stored, const void *from, int64_t id, void *to, int64_t place, int64_t width) {
    switch (stored) {
    case 0: copy_column<float, Products<float>::TOGETHER>(from, id, to, place, width); break;
    case 2: copy_column<uint16_t, Products<Float16>::TOGETHER>(from, id, to, place, width); break;
    default: copy_column<uint16_t, Products<Bfloat16>::TOGETHER>(from, id, to, place, width); break;
    }
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
            copy_column(model->stored, ends->head, id, head.panels, place, model->width);
        }
        move_first(head, place);
    }
}
