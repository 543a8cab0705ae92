// The server: what it says of the model, texts as they are generated, states, and its errors in plain words.

import { $ } from "./page.js";

let key = sessionStorage.getItem("tnllm.key") ?? "";
export const currentKey = () => key;
export function setKey(value) {
  key = value.trim();
  sessionStorage.setItem("tnllm.key", key);
}

export class ServerError extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    Object.assign(this, { status, code });
  }
}

// OpenAI's codes and HTTP's statuses → what a person should know and do.
const WORDS = {
  invalid_api_key: () => (key ? "The server does not take this API key. Enter another one in the settings."
    : "This server asks for an API key. Enter it in the settings."),
  context_length_exceeded: (message) => `This text is too long for the server: ${message}. Shorten it or start anew.`,
  queue_full: (_, wait) => `The server is busy. Try again in about ${wait ?? 10} s.`,
  shutting_down: () => "The server is shutting down. Try again when it runs again.",
  body_too_large: () => "This is more text than the server takes at once. Shorten it or start anew.",
};

async function refusal(answer) {
  const { message, code } = (await answer.json().catch(() => null))?.error ?? {};
  const words = WORDS[code]?.(message, answer.headers.get("Retry-After"));
  return new ServerError(words ?? (message ? `The server says: ${message}.` : `The server answered ${answer.status}.`), answer.status, code);
}

async function ask(path, method = "GET", body = undefined, signal = undefined) {
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: "Bearer " + key }) };
  let answer;
  try {
    answer = await fetch(path, { method, headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Does `tnllm serve` still run?");
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

const get = async (path) => (await ask(path)).json();
/** Defaults, limits and what the model is; and the names of all models, the first of which answers where none is named. */
export const about = async () => ({ ...(await get("props")), models: (await get("v1/models")).data.map(({ id }) => id) });

/** JSON, in which `seed`, a text of digits, stays exact beyond 2^53. */
function json({ seed, ...body }) {
  const text = JSON.stringify(body);
  return seed === undefined ? text : `${text.slice(0, -1)},"seed":${seed}}`;
}

/** The events of an answer. Raises ServerError, also if the connection is cut, and AbortError after `signal`. */
export async function* stream(path, body, signal) {
  const answer = await ask(path, "POST", json({ ...body, stream: true, stream_options: { include_usage: true } }), signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const cut = new ServerError("The connection was cut; the text is not complete.");
  let held = "", since = performance.now();
  for (;;) {
    // Where the next part has always come already, the loop would leave no room for a press of Stop.
    if (performance.now() - since > 50) {
      await new Promise((resolve) => setTimeout(resolve));
      since = performance.now();
    }
    const { value, done } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : cut; });
    if (done) throw cut;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(WORDS[event.error.code]?.(event.error.message) ?? `The server says: ${event.error.message}.`);
      yield event;
    }
  }
}

let statesRefused = false;
/** Reads `body` (messages, a model), after the state `before` if that is given, into a new state. Null where none is kept. */
export async function makeState(body, before) {
  if (statesRefused) return null;
  try {
    return await (await ask(before ? `v1/states/${before}/fork` : "v1/states", "POST", JSON.stringify(body))).json();
  } catch (error) {
    // A state saves time, no more: a full disk or quota, or a server of another kind, is not worth a word.
    statesRefused = [404, 413, 507].includes(error.status) && !before;
    return null;
  }
}
export const deleteState = (id) => ask(`v1/states/${id}`, "DELETE").catch(() => null);
export const isLostState = (error) => ["state_not_found", "state_damaged"].includes(error.code);

/* One text at a time. */
let running = null;
export const isRunning = () => running !== null;
export const stop = () => running?.abort();

/** Runs one request and measures it; `place` is chat or write: whose error and figures these are.

    `add` gets the text as it comes, in parts: the longer it takes to draw one, the less often it is called.

    Raises ServerError. The answer: tokens, prompt, reason (stop, length or stopped).
*/
export async function run(place, path, body, add) {
  running = new AbortController();
  showError(place);
  document.dispatchEvent(new Event("busy"));
  const meter = { begun: performance.now(), first: 0, tokens: 0, prompt: 0, reason: "" };
  const timer = setInterval(() => report(place, meter, true), 100);
  let held = "", wait = 50, drawing = null;
  const draw = () => {
    const begun = performance.now(), text = held;
    held = "";
    if (text) add(text);
    wait = Math.max(50, 4 * (performance.now() - begun));
    drawing = null;
  };
  try {
    for await (const event of stream(path, body, running.signal)) {
      const choice = event.choices[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      if (text) {
        meter.first ||= performance.now();
        meter.tokens += 1;
        held += text;
        drawing ??= setTimeout(draw, wait);
      }
      meter.reason = choice?.finish_reason ?? meter.reason;
      meter.last = performance.now();
      if (event.usage) Object.assign(meter, { tokens: event.usage.completion_tokens, prompt: event.usage.prompt_tokens });
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      meter.reason = "error";
      throw error;
    }
    meter.reason = "stopped";
  } finally {
    clearInterval(timer);
    clearTimeout(drawing);
    draw();
    running = null;
    report(place, meter, false);
    document.dispatchEvent(new Event("busy"));
  }
  return meter;
}

export function showError(place, error) {
  $(place + "-error").textContent = error?.message ?? "";
  $(place + "-error").hidden = !error;
  if (error?.code === "invalid_api_key") document.dispatchEvent(new Event("key-wanted"));
}

const ENDS = { stop: "ended by itself", length: "ended by length", stopped: "stopped by you", error: "not complete" };

function report(place, meter, live) {
  const seconds = ((live ? performance.now() : meter.last ?? 0) - meter.first) / 1000;
  const parts = [];
  if (meter.first) {
    parts.push(`${meter.tokens} ${meter.tokens === 1 ? "token" : "tokens"}`);
    if (meter.tokens > 1 && seconds > 0) parts.push(`${((meter.tokens - 1) / seconds).toFixed(1)} tokens/s`);
    parts.push(`${Math.round(meter.first - meter.begun)} ms to the first`);
  } else if (live) parts.push("reading");
  if (meter.prompt) parts.push(`${meter.prompt} read`);
  if (!live) parts.push(ENDS[meter.reason] ?? "");
  figures(place, parts);
}

/** The line of figures under the input; `more` adds to it. */
export function figures(place, parts, more = false) {
  const spans = parts.filter(Boolean).map((part) => Object.assign(document.createElement("span"), { textContent: part }));
  if (more) $(place + "-stats").append(...spans);
  else $(place + "-stats").replaceChildren(...spans);
}
