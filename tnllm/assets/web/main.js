// The frame: tabs, sheets, appearance, the API key; it starts the other modules.

import { freshTalk, showList, startChat } from "./chat.js";
import { $, load, save } from "./page.js";
import { about, currentKey, isRunning, setKey, showError, stop } from "./server.js";
import { chosenModel, showSettings } from "./settings.js";
import { freshText, paint, startWrite } from "./write.js";

/* Appearance. */
const root = document.documentElement;
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
if (load("theme")) root.dataset.theme = load("theme");
$("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  save("theme", root.dataset.theme);
});

/* Tabs: arrow keys move between them. */
const MODES = ["chat", "write"];
let model = null;
function setMode(name) {
  document.body.dataset.mode = name;
  for (const other of MODES) {
    $(other).hidden = other !== name;
    $("tab-" + other).setAttribute("aria-selected", other === name);
    $("tab-" + other).tabIndex = other === name ? 0 : -1;
  }
  const notes = [];
  if (model?.is_demo) notes.push("A toy: this demo model is very small. It answers in sentences, and often wrongly.");
  if (model && name === "chat" && !model.is_chat_tuned) notes.push("It was not trained to chat: Write suits it better.");
  $("note").textContent = notes.join(" ");
  $("note").hidden = !notes.length;
  paint();
}
function choose(name) {
  save("mode", name);
  setMode(name);
}
for (const [index, name] of MODES.entries()) {
  $("tab-" + name).addEventListener("click", () => choose(name));
  $("tab-" + name).addEventListener("keydown", (event) => {
    const move = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: MODES.length - 1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const next = MODES.at(move % MODES.length);
    choose(next);
    $("tab-" + next).focus();
  });
}

/* Talks and settings: columns where there is room, else modal sheets, which keep the focus until they are closed. */
const wide = matchMedia("(min-width: 1101px)");
function arrange(dialog) {
  if (dialog.open) dialog.close();
  if (wide.matches) dialog.setAttribute("open", "");
}
function openSheet(dialog) {
  if (!wide.matches && !dialog.open) dialog.showModal();
}
for (const name of ["talks", "settings"]) {
  const dialog = $(name);
  arrange(dialog);
  wide.addEventListener("change", () => arrange(dialog));
  $("show-" + name).addEventListener("click", () => openSheet(dialog));
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => document.body.append($("toast")));
  dialog.addEventListener("click", (event) => { if (event.target === dialog && dialog.matches(":modal")) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.key !== "Tab" || !dialog.matches(":modal")) return;
    const stops = [...dialog.querySelectorAll("button, input, select, textarea, summary, [tabindex='0']")].filter((one) => !one.disabled && one.checkVisibility());
    const [from, to] = event.shiftKey ? [stops[0], stops.at(-1)] : [stops.at(-1), stops[0]];
    if (document.activeElement === from) { event.preventDefault(); to.focus(); }
  });
}

/* While a text is generated, Stop is in the place of Send and Continue. */
document.addEventListener("busy", () => {
  const focused = document.activeElement, on = isRunning();
  for (const [start, end] of [["send", "chat-stop"], ["go", "write-stop"]]) {
    $(start).hidden = on;
    $(end).hidden = !on;
    if (focused === $(start) || focused === $(end)) $(on ? end : start).focus();
  }
  $("fresh").disabled = on;
  document.body.classList.toggle("busy", on);
  showList();
  paint();
});
$("chat-stop").addEventListener("click", stop);
$("write-stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !document.querySelector("dialog:modal")) stop(); });
$("fresh").addEventListener("click", () => (document.body.dataset.mode === "chat" ? freshTalk : freshText)());

/* The model, and the key, if the server asks for one. */
document.addEventListener("key-wanted", () => {
  $("key-field").hidden = false;
  openSheet($("settings"));
  $("key").focus();
});
$("key").value = currentKey();
$("key").addEventListener("change", () => { setKey($("key").value); meet(); });

async function meet() {
  const place = document.body.dataset.mode ?? "chat";
  try {
    model = await about();
    showError(place);
    showSettings(model, () => {
      $("model").textContent = chosenModel().model ?? model.model_alias;
      document.title = $("model").textContent + " · tnllm";
    });
    setMode(load("mode", model.is_chat_tuned ? "chat" : "write"));
    if (currentKey()) $("key-field").hidden = false;
    if ($("settings").matches(":modal")) $("settings").close();
  } catch (error) {
    setMode(place);
    showError(place, error);
  }
}

startChat();
startWrite();
meet();
