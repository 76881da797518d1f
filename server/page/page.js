"use strict";
// The form, the order of the two requests, and what their answers together say.

const RETRY_MS = 2000;
const DRAFTS_IF_SERVER_MAKES_NONE = 3;

const byId = (id) => document.getElementById(id);
const numberIn = (id) => Number(byId(id).value);
const sides = {
  plain: new Side(byId("plain"), showSpeedUp),
  speculative: new Side(byId("speculative"), showSpeedUp),
};
let info = null;
let retry = 0;
let running = null;

// Fills the form from what the server allows; asks again until it answers.
async function findServer() {
  clearTimeout(retry);
  const line = byId("server");
  try {
    const chosen = byId("model").value;
    const found = await (await ask(`server_info${chosen && `?model=${encodeURIComponent(chosen)}`}`)).json();
    const isFirst = info?.model !== found.model;
    info = found;
    setModels();
    setRanges(isFirst);
    line.textContent = `${info.model} · ${info.num_layers} layers · ${info.dtype} on ${info.device} · ${info.version}`;
    line.className = "muted";
  } catch (error) {
    if (!(error instanceof Unanswered)) throw error;
    lose(error);
  }
}

function lose(error) {
  const isLocked = error.status === 401;
  const reason = error.status ? error.message : "No connection to the server.";
  byId("server").textContent = isLocked ? "This server wants a key, or another one." : `${reason} Trying again…`;
  byId("server").className = "lost";
  clearTimeout(retry);
  if (!isLocked) {
    retry = setTimeout(findServer, RETRY_MS);
    return;
  }
  byId("access").open = true;
  byId("key").focus();
}

// Offers the models that the server has, if they are several.
function setModels() {
  const names = Object.keys(info.models);
  byId("models").hidden = names.length < 2;
  byId("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === info.model)));
}

function setRanges(isFirst) {
  const layers = info.allowed_exit_layers;
  const longest = info.limits.max_draft_length;
  byId("exit-layer").max = layers.length - 1;
  byId("draft-length").max = longest;
  byId("draft-length").min = Math.min(1, longest);
  byId("max-tokens").max = info.limits.max_model_len - 1;
  if (isFirst) {
    byId("exit-layer").value = layers.indexOf(info.first_exit_layer);
    byId("draft-length").value = info.first_draft_length || DRAFTS_IF_SERVER_MAKES_NONE;
    byId("max-tokens").value = Math.min(numberIn("max-tokens"), Math.ceil(info.limits.max_model_len / 2));
  }
  byId("choices").disabled = false;
  showChoices();
}

const exitLayer = () => info.allowed_exit_layers[numberIn("exit-layer")];

function showChoices() {
  const layer = `${exitLayer()} of ${info.num_layers}`;
  byId("exit-layer-shown").textContent = layer;
  byId("exit-layer").setAttribute("aria-valuetext", layer);
  byId("draft-length-shown").textContent = byId("draft-length").value;
  byId("temperature-shown").textContent = numberIn("temperature") ? byId("temperature").value : "0, the likeliest token";
  byId("drafting").textContent = `${exitLayer()} layers draft, ${info.num_layers - exitLayer()} verify`;
}

function showSpeedUp() {
  const [plain, speculative] = [sides.plain, sides.speculative].map(({ tally }) => tally?.perSecond);
  byId("speed-up").hidden = !(plain && speculative);
  byId("speed-up").firstElementChild.textContent = `${(speculative / plain).toFixed(2)}×`;
}

async function run() {
  const seed = byId("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : numberIn("seed");
  const shared = { model: info.model, prompt: byId("prompt").value, max_tokens: numberIn("max-tokens") };
  const request = { ...shared, temperature: numberIn("temperature"), seed };
  const drafting = { exit_layer: exitLayer(), draft_length: numberIn("draft-length"), return_draft_trace: true };
  const { signal } = (running = new AbortController());
  const plain = () => sides.plain.answer({ ...request, draft_length: 0 }, signal);
  const speculative = () => sides.speculative.answer({ ...request, ...drafting }, signal);
  begin();
  try {
    if (byId("at-once").checked) {
      say("Decoding both at once: they share the machine.");
      await settled([plain(), speculative()]);
    } else {
      say("Decoding plainly…");
      await plain();
      say("Decoding with speculation…");
      await speculative();
    }
    say(`The same text with and without speculation${request.temperature ? `, with seed ${seed}` : ""}.`);
  } catch (error) {
    say(isStop(error) ? "Stopped." : "No comparison: an answer is missing.");
    if (error instanceof Unanswered) lostAnswer(error);
    else if (!isStop(error)) throw error;
  } finally {
    end();
    compare();
  }
}

// Waits for all, then throws the first reason of failure: one answer's end must not hide the other.
async function settled(promises) {
  const failure = (await Promise.allSettled(promises)).find(({ status }) => status === "rejected");
  if (failure) throw failure.reason;
}

function lostAnswer(error) {
  if (error.status === undefined || error.status === 401) lose(error);
}

function begin() {
  byId("alarm").hidden = true;
  for (const side of Object.values(sides)) side.clear();
  showSpeedUp();
  if (byId("plain").getBoundingClientRect().top > innerHeight / 2) byId("result").scrollIntoView();
  byId("stop").disabled = false;
  if (document.activeElement === byId("generate")) byId("stop").focus();
  byId("generate").disabled = true;
}

function end() {
  running = null;
  byId("generate").disabled = false;
  if (document.activeElement === byId("stop")) byId("generate").focus();
  byId("stop").disabled = true;
}

function say(sentence) {
  byId("verdict").textContent = sentence;
}

// Raises the alarm if the texts differ; of one that is not complete, as far as it goes.
function compare() {
  const { plain, speculative } = sides;
  const length = Math.min(
    ...[plain, speculative].map(({ text, isComplete }) => (isComplete ? Infinity : text.length)),
    Math.max(plain.text.length, speculative.text.length),
  );
  let same = 0;
  while (same < length && plain.text[same] === speculative.text[same]) same += 1;
  if (same === length) return;
  const excerpt = ({ text }) => JSON.stringify(text.slice(Math.max(0, same - 20), same + 30));
  const isRounded = /16/.test(info.dtype);
  byId("alarm").textContent =
    `The texts differ from character ${same + 1} on, and must not: one seed, one text.` +
    (isRounded ? ` (In ${info.dtype} two tokens that are nearly equally likely can change places.)` : "") +
    `\nplain: …${excerpt(plain)}\nspeculative: …${excerpt(speculative)}`;
  byId("alarm").hidden = false;
  say("The texts differ.");
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) run();
});
byId("form").addEventListener("input", () => info && showChoices());
byId("model").addEventListener("change", findServer);
byId("stop").addEventListener("click", () => running?.abort());
byId("show-refused").addEventListener("change", ({ target }) => {
  document.body.classList.toggle("without-refused", !target.checked);
});
byId("key").addEventListener("change", ({ target }) => {
  if (target.value) sessionStorage.setItem(KEY, target.value);
  else sessionStorage.removeItem(KEY);
  findServer();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !byId("generate").matches(":disabled")) {
    byId("form").requestSubmit();
  }
});
findServer();
