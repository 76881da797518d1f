"use strict";
// What became of drafts, and how fast an answer came; knows nothing of the page.

// Tells which pieces of streamed text were drafts. Text may come later than its cycle, because bytes that are no
// character yet are held back; and the text of the token that follows the drafts is known only by what is around it.
class DraftTrace {
  #expected = [];

  // The pieces of `text`, and between them refused drafts; the pieces that are not refused are together `text`.
  split(text, cycles) {
    const pieces = [];
    let rest = text;
    const give = (kind, length) => {
      if (length) pieces.push({ kind, text: rest.slice(0, length) });
      rest = rest.slice(length);
    };
    this.#expected.push(...cycles.flatMap(DraftTrace.#piecesOf));
    while (this.#expected.length && (rest || this.#expected[0].kind === "refused")) {
      const piece = this.#expected.shift();
      if (piece.kind === "refused") pieces.push(piece);
      else if (piece.kind === "next") give("next", this.#lengthOfNext(rest));
      else give("kept", this.#lengthOfKept(piece.text, rest));
    }
    give("text", rest.length);
    return pieces;
  }

  static #piecesOf({ drafted_tokens: drafts, kept }) {
    const pieces = drafts.map((text, position) => ({ kind: position < kept ? "kept" : "refused", text }));
    return [...pieces.filter(({ kind, text }) => text || kind === "refused"), { kind: "next" }];
  }

  // Up to what is kept of the following cycles. Where nothing is, the last of several takes all.
  #lengthOfNext(rest) {
    const following = this.#expected.find(({ kind }) => kind !== "refused");
    if (!following) return rest.length;
    if (following.kind === "next") return 0;
    const end = rest.indexOf(following.text);
    return end < 0 ? rest.length : end;
  }

  // A token alone may read differently from the same token in its text: then nothing more is known of this text.
  #lengthOfKept(token, rest) {
    if (rest.startsWith(token)) return token.length;
    if (rest.startsWith(` ${token}`)) return token.length + 1;
    if (token.startsWith(rest)) {
      this.#expected.unshift({ kind: "kept", text: token.slice(rest.length) });
      return rest.length;
    }
    this.#expected = this.#expected.filter(({ kind }) => kind === "refused");
    return 0;
  }
}

// Counts one answer. Times are those of arrival; `perSecond` leaves out the wait for the first token.
class Tally {
  tokens = 0;
  cycles = 0;
  drafted = 0;
  kept = 0;
  #startedMs = performance.now();
  #first = null;
  #latestMs = 0;

  take(chunk) {
    const tokens = chunk.usage?.completion_tokens ?? this.tokens;
    if (tokens > this.tokens) {
      this.tokens = tokens;
      this.#latestMs = performance.now();
      this.#first ??= { atMs: this.#latestMs, tokens };
    }
    for (const cycle of chunk.choices[0]?.draft_trace ?? []) {
      this.cycles += cycle.drafted_ids.length ? 1 : 0;
      this.drafted += cycle.drafted_ids.length;
      this.kept += cycle.kept;
    }
    const total = chunk.metrics?.speculative_decoding;
    if (!total) return;
    this.cycles = total.num_spec_steps;
    this.drafted = total.num_draft_tokens;
    this.kept = total.num_accepted_draft_tokens;
  }

  get firstMs() {
    return this.#first && this.#first.atMs - this.#startedMs;
  }

  get perSecond() {
    const elapsedMs = this.#first ? this.#latestMs - this.#first.atMs : 0;
    return elapsedMs > 0 ? (1000 * (this.tokens - this.#first.tokens)) / elapsedMs : null;
  }

  get acceptance() {
    return this.drafted ? this.kept / this.drafted : null;
  }

  get tokensPerCycle() {
    if (this.cycles) return 1 + this.kept / this.cycles;
    return this.tokens ? 1 : null;
  }
}
