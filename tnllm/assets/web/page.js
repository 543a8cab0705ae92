// What every module of the page uses: elements, storage, and short notices.

export const $ = (id) => document.getElementById(id);

/** A new element: its properties, then what it holds. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** One of the drawings at the head of the page. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.append(document.createElementNS(svg.namespaceURI, "use"));
  svg.firstChild.setAttribute("href", "#i-" + name);
  return svg;
}

const PREFIX = "tnllm.";

export function load(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** False if the browser keeps nothing (a private window, or its storage is full). */
export function save(key, value) {
  try {
    localStorage.setItem(PREFIX + key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const remove = (key) => localStorage.removeItem(PREFIX + key);

/** Keys that begin so, without the prefix that all of the page's have. */
export function keys(start) {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX + start)).map((key) => key.slice(PREFIX.length));
  } catch {
    return [];
  }
}

let notice;
/** A line at the foot of the page for some seconds; `undo` is what its button does. */
export function tell(text, undo) {
  clearTimeout(notice);
  const hide = () => $("toast").replaceChildren();
  const button = undo && make("button", { textContent: "Undo", onclick: () => { hide(); undo(); } });
  // What is outside of a modal sheet cannot be pressed.
  (document.querySelector("dialog:modal") ?? document.body).append($("toast"));
  $("toast").replaceChildren(make("span", { textContent: text }), ...(undo ? [button] : []));
  notice = setTimeout(hide, undo ? 12000 : 4000);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https, or where the browser denies it.
    const area = make("textarea", { value: text, className: "unseen" });
    (document.querySelector("dialog:modal") ?? document.body).append(area);
    const before = document.activeElement;
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    before?.focus();
    if (!copied) return tell("The browser does not let this page copy.");
  }
  tell("Copied.");
}

export function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

// Where a sentence ends: a mark, what closes it, and space, which Chinese and Japanese do without; or a line.
const SENTENCE = /[.!?…]+["'”’)\]]*\s+|[。！？]+[”’」』）]*|\n+/g;

/** Reads a text aloud, to those whose browser reads pages to them, one full sentence at a time. */
export class Speaker {
  #said = 0;

  /** `text` so far; `ended`: nothing follows. */
  hear(text, ended = false) {
    const rest = text.slice(this.#said);
    const end = ended ? rest.length : Math.max(0, ...[...rest.matchAll(SENTENCE)].map((match) => match.index + match[0].length));
    this.#said += end;
    const words = rest.slice(0, end).trim();
    if (words) $("spoken").append(make("p", { textContent: words, dir: "auto" }));
    while ($("spoken").childElementCount > 8) $("spoken").firstChild.remove();
  }
}
