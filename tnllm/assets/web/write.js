// Write: a text and its continuation. `before` is the text before the last one, which is marked.

import { $, copy, download, load, save, Speaker } from "./page.js";
import { isRunning, run, showError } from "./server.js";
import { options } from "./settings.js";

let before = null;

export function paint() {
  const text = $("text").value, start = before === null ? text.length : before.length;
  const mark = Object.assign(document.createElement("mark"), { textContent: text.slice(start) });
  $("layer").replaceChildren(text.slice(0, start), mark, "\n");
  $("layer").scrollTop = $("text").scrollTop;
  $("again").disabled = $("undo").disabled = isRunning() || before === null;
  $("text").readOnly = isRunning();
}

function keep() {
  if (!save("text", $("text").value) || !save("before", before)) {
    showError("write", new Error("The browser does not keep a text this long. Export it before the page is closed."));
  }
}

async function proceed() {
  if (isRunning()) return;
  const start = (before = $("text").value), speaker = new Speaker();
  try {
    await run("write", "v1/completions", { ...options(), prompt: start }, (more) => {
      const near = $("text").scrollHeight - $("text").scrollTop - $("text").clientHeight < 80;
      $("text").value += more;
      if (near) $("text").scrollTop = $("text").scrollHeight;
      speaker.hear($("text").value.slice(start.length));
      paint();
    });
  } catch (error) {
    showError("write", error);
  }
  speaker.hear($("text").value.slice(start.length), true);
  if ($("text").value === start) before = null;
  paint();
  keep();
}

function back() {
  if (before === null || isRunning()) return;
  $("text").value = before;
  before = null;
  paint();
  keep();
  $("go").focus();
}

function changed() {
  before = null;
  paint();
  keep();
}

export function freshText() {
  showError("write");
  $("write-stats").replaceChildren();
  $("text").value = "";
  changed();
  $("text").focus();
}

export function startWrite() {
  $("text").value = load("text", "Once upon a time");
  before = load("before", null);
  if (before !== null && !$("text").value.startsWith(before)) before = null;
  $("go").addEventListener("click", proceed);
  $("undo").addEventListener("click", back);
  $("again").addEventListener("click", () => { back(); proceed(); });
  $("copy-text").addEventListener("click", () => copy($("text").value));
  $("export-text").addEventListener("click", () => download("text.txt", $("text").value, "text/plain"));
  $("text").addEventListener("input", changed);
  $("text").addEventListener("scroll", () => { $("layer").scrollTop = $("text").scrollTop; });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); proceed(); }
  });
  addEventListener("pagehide", () => { if (isRunning()) keep(); });
  paint();
}
