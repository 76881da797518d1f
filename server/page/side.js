"use strict";
// One of the two answers on the page. What a model or a server says becomes text, never markup.

const FIGURES = {
  "tokens/s": (tally) => tally.perSecond?.toFixed(1),
  "first token": (tally) => tally.firstMs && `${tally.firstMs.toFixed(0)} ms`,
  acceptance: (tally) => tally.acceptance !== null && `${(100 * tally.acceptance).toFixed(0)} %`,
  "tokens/cycle": (tally) => tally.tokensPerCycle?.toFixed(2),
  tokens: (tally) => tally.tokens,
};
const NONE = "–";

function make(tag, text, kind = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = kind;
  return element;
}

function elementOf({ kind, text }) {
  // A refused draft stands between tokens of the text: it must not break their lines, nor take much of them.
  const shown = kind === "refused" ? text.replace(/\s*\n\s*/g, "↵").trim() || "·" : text;
  return make("span", shown, kind === "kept" && text.startsWith("\n") ? "kept break" : kind);
}

class Side {
  // `onChange` is called whenever the figures change.
  constructor(section, onChange) {
    const find = (selector) => section.querySelector(selector);
    this.output = find("pre");
    this.failure = find(".failure");
    this.foot = find(".foot");
    this.bar = find("progress");
    this.onChange = onChange;
    this.figures = Object.keys(FIGURES).map((name) => {
      const row = document.createElement("div");
      row.append(make("dt", name), make("dd", NONE));
      find("dl").append(row);
      return row.lastChild;
    });
    this.clear();
  }

  clear() {
    this.text = "";
    this.isComplete = false;
    this.tally = null;
    this.output.replaceChildren();
    this.failure.hidden = true;
    this.foot.textContent = "";
    this.bar.value = 0;
    for (const figure of this.figures) figure.textContent = NONE;
  }

  // Show the answer to `body` as it comes. Throws what ended it early, after showing that.
  async answer(body, signal) {
    this.tally = new Tally();
    this.trace = new DraftTrace();
    this.output.setAttribute("aria-busy", "true");
    try {
      for await (const chunk of complete(body, signal)) this.#take(chunk, body);
    } catch (error) {
      this.#fail(error);
      throw error;
    } finally {
      this.output.removeAttribute("aria-busy");
    }
  }

  #take(chunk, body) {
    const choice = chunk.choices[0];
    this.tally.take(chunk);
    this.bar.value = this.tally.tokens / body.max_tokens;
    Object.values(FIGURES).forEach((figure, index) => {
      this.figures[index].textContent = figure(this.tally) || NONE;
    });
    if (choice) this.#show(choice);
    if (choice?.finish_reason) this.#end(choice, chunk.usage, body);
    this.onChange();
  }

  #show({ text, draft_trace: cycles }) {
    const isAtEnd = this.output.scrollHeight - this.output.scrollTop - this.output.clientHeight < 40;
    this.text += text;
    if (cycles) this.output.append(...this.trace.split(text, cycles).map(elementOf));
    else this.output.append(text);
    if (isAtEnd) this.output.scrollTop = this.output.scrollHeight;
  }

  #end({ finish_reason: reason, draft_trace: cycles }, usage, body) {
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    const notes = [reason === "length" ? "ended at max tokens" : "ended by the model"];
    if (cached) notes.push(`${cached} of ${usage.prompt_tokens} prompt tokens were in the cache`);
    if (body.return_draft_trace && !cycles) notes.push("this server tells nothing of single drafts");
    this.isComplete = true;
    this.bar.value = 1;
    this.foot.textContent = notes.join(" · ");
  }

  #fail(error) {
    this.failure.hidden = isStop(error);
    this.failure.textContent = error.message;
    this.foot.textContent = isStop(error) ? "stopped" : "";
  }
}
