"use strict";
// Asks the server that sent this page, by relative paths.

const KEY = "layerskip-api-key";

// A request that has no answer, or not all of it; `status` is undefined if the server is gone.
class Unanswered extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const isStop = (error) => error.name === "AbortError";

// The response to a request. Throws Unanswered.
async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw isStop(error) ? error : new Unanswered("The server cannot be reached.");
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const reason = body?.error?.message ?? response.statusText;
  throw new Unanswered(`The server answered ${response.status}: ${reason}`, response.status);
}

const broken = () => new Unanswered("The connection broke before the answer was complete.");

// The lines of a stream of bytes as they come. Throws Unanswered if the connection breaks.
async function* linesOf(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw isStop(error) ? error : broken();
    });
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    yield* lines;
  }
}

// The chunks of a completion as they come. Throws Unanswered, also when the server gives up midway.
async function* complete(body, signal) {
  const usage = { include_usage: true, continuous_usage_stats: true };
  const request = JSON.stringify({ ...body, stream: true, stream_options: usage });
  const response = await ask("v1/completions", { method: "POST", body: request, signal });
  for await (const line of linesOf(response.body)) {
    if (!line.startsWith("data: ")) continue;
    if (line === "data: [DONE]") return;
    const chunk = JSON.parse(line.slice(6));
    if (chunk.error) throw new Unanswered(`The server gave up: ${chunk.error.message}`, response.status);
    yield chunk;
  }
  throw broken();
}
