// Sampling settings. Only what a person has touched is kept and sent, so that the model's own defaults hold for the rest.

import { $, load, make, save } from "./page.js";

const SLIDERS = {
  temperature: ["Temperature", 0, 2, 0.05, "0 always takes the most likely token."],
  top_p: ["Top p", 0.05, 1, 0.01, "The most likely tokens that together reach this probability."],
  min_p: ["Min p", 0, 0.5, 0.01, "Drops tokens below this share of the top token's probability."],
  repetition_penalty: ["Repetition penalty", 1, 2, 0.01, "Above 1, tokens that occurred become less likely."],
  presence_penalty: ["Presence penalty", -2, 2, 0.1, "Above 0, generated tokens become less likely."],
  frequency_penalty: ["Frequency penalty", -2, 2, 0.1, "The same for every time a token was generated."],
};
// Whole numbers are kept as texts: a seed may exceed what a JavaScript number holds.
const NUMBERS = {
  max_tokens: ["Length", 1, "Most tokens to generate."],
  top_k: ["Top k", 0, "The k most likely tokens; 0 is all."],
  seed: ["Seed", 0, "The same seed gives the same text.", 2n ** 63n - 1n],
};
const TEXTS = {
  stop: ["Stop at", "The text ends before this. \\n is a new line."],
  system: ["System text", "Precedes every conversation."],
};
const FEW = ["system", "temperature", "max_tokens", "seed"];
const MORE = ["top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop"];

const touched = load("settings", {});
let about, defaults;

/** The model that was chosen, as a key of a request; none for the first. */
export const chosenModel = () => (about?.models.indexOf(touched.model) > 0 ? { model: touched.model } : {});
export const system = () => (touched.system ?? "").trim();

/** What is sent with a request. Raises Error, which names a value that is not allowed. */
export function options() {
  const chosen = { ...chosenModel() };
  for (const name of Object.keys(SLIDERS)) if (name in touched) chosen[name] = touched[name];
  for (const name of Object.keys(NUMBERS)) {
    const problem = problemOf(name);
    if (problem) throw new Error(problem);
    const text = numberText(name);
    if (text) chosen[name] = name === "seed" ? text : Number(text);
  }
  if (touched.stop) chosen.stop = [touched.stop.replaceAll("\\n", "\n")];
  return chosen;
}

const numberText = (name) => String(touched[name] ?? "").trim().replace(/^0+(?=\d)/, "");

/** What is wrong with a whole number, in words. */
function problemOf(name) {
  const text = numberText(name);
  const [title, low, , most] = NUMBERS[name];
  const high = name === "max_tokens" ? about?.limits.new_tokens : most;
  if (!text) return "";
  const fits = /^\d{1,40}$/.test(text) && BigInt(text) >= low && (high === undefined || BigInt(text) <= BigInt(high));
  const allowed = high === undefined ? `${low} or more` : `${low} to ${high}`;
  return fits ? "" : `${title} is ${text.length > 40 ? text.slice(0, 40) + "…" : text}; allowed: a whole number, ${allowed}.`;
}

function touch(name, value) {
  if (value === undefined || value === "") delete touched[name];
  else touched[name] = value;
  save("settings", touched);
}

function field(name, title, help, input) {
  const note = make("small", { id: name + "-help", textContent: help });
  const value = make("output", {}), back = make("button", { className: "back", textContent: "reset", ariaLabel: `Reset: ${title}` });
  Object.assign(input, { id: name });
  input.setAttribute("aria-describedby", note.id);
  const label = make("label", { htmlFor: name, textContent: title });
  const box = make("div", { className: "field", id: name + "-field" }, make("div", { className: "field-head" }, label, value, back), input, note);
  return { box, note, value, back };
}

function slider(name) {
  const [title, min, max, step, help] = SLIDERS[name];
  const input = make("input", { type: "range", min, max, step });
  const { box, value, back } = field(name, title, help, input);
  const show = () => {
    const isOwn = name in touched;
    input.value = touched[name] ?? defaults[name];
    value.textContent = isOwn ? Number(input.value) : `${defaults[name]} (default)`;
    input.setAttribute("aria-valuetext", value.textContent);
    input.style.setProperty("--at", `${(100 * (input.value - min)) / (max - min)}%`);
    back.hidden = !isOwn;
  };
  input.addEventListener("input", () => { touch(name, Number(input.value)); show(); });
  back.addEventListener("click", () => { touch(name); show(); input.focus(); });
  show();
  return box;
}

function number(name) {
  const [title, , help] = NUMBERS[name];
  const input = make("input", { className: "text", inputMode: "numeric", autocomplete: "off", value: touched[name] ?? "" });
  input.placeholder = name === "seed" ? "a new one each time" : `${defaults[name]} (default)`;
  const { box, note, back } = field(name, title, help, input);
  const show = () => {
    const problem = problemOf(name);
    input.setAttribute("aria-invalid", problem !== "");
    note.textContent = problem || help;
    back.hidden = input.value === "";
  };
  input.addEventListener("input", () => { touch(name, input.value); show(); });
  back.addEventListener("click", () => { touch(name); input.value = ""; show(); input.focus(); });
  show();
  return box;
}

function text(name) {
  const [title, help] = TEXTS[name];
  const input = make(name === "system" ? "textarea" : "input", { className: "text", dir: "auto", value: touched[name] ?? "" });
  if (name === "system") input.rows = 2;
  const { box, back } = field(name, title, help, input);
  back.hidden = true;
  input.addEventListener("input", () => touch(name, input.value));
  return box;
}

function picker(onModel) {
  const input = make("select", { className: "text" }, ...about.models.map((name) => make("option", { textContent: name })));
  const { box, back } = field("model-name", "Model", "Answers the next message; a talk may have several.", input);
  const show = () => {
    input.value = chosenModel().model ?? about.models[0];
    back.hidden = input.selectedIndex === 0;
  };
  const choose = (name) => { touch("model", name); show(); onModel(); };
  input.addEventListener("change", () => choose(input.selectedIndex ? input.value : ""));
  back.addEventListener("click", () => { choose(); input.focus(); });
  show();
  return box;
}

function build(onModel) {
  const made = (name) => (SLIDERS[name] ? slider : NUMBERS[name] ? number : text)(name);
  const open = $("more")?.open || MORE.some((name) => name in touched);
  $("few")?.remove();
  $("more")?.remove();
  $("fields").append(
    make("div", { id: "few" }, ...(about.models.length > 1 ? [picker(onModel)] : []), ...FEW.map(made)),
    make("details", { id: "more", open }, make("summary", { textContent: "More" }), ...MORE.map(made)),
  );
}

/** Show the settings beside the model's defaults; `onModel` is called when a model is chosen, and now. */
export function showSettings(model, onModel) {
  about = model;
  defaults = about.default_generation_settings.params;
  const show = () => { build(onModel); onModel(); };
  show();
  $("reset").onclick = () => {
    Object.keys(touched).forEach((name) => touch(name));
    show();
  };
}
