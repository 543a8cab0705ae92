// Talks: kept in this browser, message by message, and on the server as states, so that a long one is not read again.

import { markdown } from "./markdown.js";
import { $, copy, download, icon, keys, load, make, remove, save, Speaker, tell } from "./page.js";
import { deleteState, figures, isLostState, isRunning, makeState, run, showError } from "./server.js";
import { chosenModel, options, system } from "./settings.js";

/* A talk: id, changed (ms), messages ({role, content}), and states, oldest first: {id, count, system, model, bytes}, each
   of the first `count` messages after that system text, read by that model. */
const talks = new Map();
let talk;
// A state is kept of the last two answers, so that the last one can be asked for again, in the talks used last.
const STATES_OF_A_TALK = 2, TALKS_WITH_STATES = 4;
const IDEAS = ["Who are you?", "Tell me of the sea.", "春風", "What is a good life?"];

const newTalk = () => ({ id: Date.now().toString(36) + Math.random().toString(36).slice(2, 8), changed: 0, messages: [], states: [] });
const titleOf = (one) => one.messages[0]?.content.trim().split("\n")[0].slice(0, 80) || "Untitled";
const byAge = () => [...talks.values()].sort((a, b) => b.changed - a.changed);
const latest = () => talk.messages.length - 1;

function keep(one) {
  if (!one.messages.length) return drop(one);
  talks.set(one.id, one);
  if (!save("chat." + one.id, one)) {
    showError("chat", new Error("The browser keeps no more. Export or delete talks; this one is lost when the page is closed."));
  }
}

function drop(one) {
  talks.delete(one.id);
  remove("chat." + one.id);
}

/* States. */

/** Forget the states of more than `count` messages. */
function cutStates(one, count) {
  for (const state of one.states.filter((state) => state.count > count)) deleteState(state.id);
  one.states = one.states.filter((state) => state.count <= count);
}

/** What to send for the first messages of a talk: those that its latest state before `end` does not hold. */
function parts(one, end, messages = one.messages) {
  const state = one.states.findLast((state) => state.count <= end && state.system === system() && state.model === chosenModel().model);
  const first = system() && !state ? [{ role: "system", content: system() }] : [];
  return { state, messages: [...first, ...messages.slice(state?.count ?? 0).map(({ role, content }) => ({ role, content }))] };
}

async function keepState(one) {
  const { messages } = one, count = messages.length, text = system(), { model } = chosenModel();
  const { state, messages: rest } = parts(one, count - 1, messages.slice(0, count));
  const made = await makeState({ messages: rest, model }, state?.id);
  if (!made) return;
  // Edited, deleted or set otherwise meanwhile.
  const isOld = messages.slice(0, count).some((message, index) => one.messages[index] !== message);
  if (isOld || text !== system() || model !== chosenModel().model || !talks.has(one.id)) return deleteState(made.id);
  one.states.push({ id: made.id, count, system: text, model, bytes: made.bytes });
  for (const old of one.states.splice(0, one.states.length - STATES_OF_A_TALK)) deleteState(old.id);
  for (const old of byAge().slice(TALKS_WITH_STATES)) if (old.states.length) { cutStates(old, -1); keep(old); }
  keep(one);
  if (one === talk && !isRunning()) figures("chat", [`state ${(made.bytes / 2 ** 20).toFixed(1)} MiB`], true);
}

/* What is seen. */

// Whether the end is in view; then it stays there, whatever grows or shrinks.
let atEnd = true;
const follow = () => { if (atEnd) $("scroll").scrollTop = $("scroll").scrollHeight; };
function toEnd() {
  atEnd = true;
  follow();
}

// Turns as they were drawn last: a long talk is not drawn again for one more answer.
const drawn = new WeakMap();
function drawnTurn(message, index) {
  const old = drawn.get(message), isLast = index === latest();
  if (old?.index === index && old.isLast === isLast) return old.article;
  const article = turn(message, index);
  drawn.set(message, { index, isLast, article });
  return article;
}

function show() {
  $("talk").replaceChildren(...talk.messages.map(drawnTurn));
  if (!talk.messages.length) $("talk").append(welcome());
  showList();
  follow();
}

function welcome() {
  const ideas = IDEAS.map((idea) => make("button", { textContent: idea, onclick: () => ask(idea) }));
  return make("div", { className: "empty" }, make("h2", { textContent: "What shall we talk about?" }),
    "However long the talk, its state stays the same size.", make("div", { className: "ideas" }, ...ideas));
}

function turn(message, index) {
  const text = make("div", { className: "text", dir: "auto" });
  const isUser = message.role === "user";
  if (isUser) text.textContent = message.content;
  else if (message.content) text.append(...markdown(message.content));
  else text.append(make("p", { className: "none", textContent: "no answer" }));
  const act = (name, title, onclick) => make("button", { className: "icon", title, ariaLabel: title, onclick }, icon(name));
  const acts = [act("copy", "Copy", () => copy(message.content)), act("edit", "Edit", () => edit(index))];
  if (!isUser && index === latest()) acts.push(act("again", "Answer again", () => again()));
  if (!isUser && index === latest() && message.isCut) acts.push(act("go", "Continue", () => isOccupied() || answer()));
  acts.push(act("trash", isUser ? "Delete, with its answer" : "Delete", () => removeTurn(index)));
  const article = make("article", { className: "turn " + message.role, ariaLabel: isUser ? "You" : "Answer" }, text);
  article.append(make("div", { className: "acts" }, ...acts));
  return article;
}

export function showList() {
  const item = (one) => {
    const open = make("button", { className: "open", textContent: titleOf(one), dir: "auto", disabled: isRunning(), onclick: () => openTalk(one) });
    if (one === talk) open.setAttribute("aria-current", "true");
    const trash = make("button", { className: "icon", title: "Delete", ariaLabel: `Delete: ${titleOf(one)}`, disabled: isRunning(), onclick: () => deleteTalk(one) }, icon("trash"));
    return make("li", {}, open, trash);
  };
  const items = byAge().map(item);
  $("talk-list").replaceChildren(...(items.length ? items : [make("li", { className: "none", textContent: "None yet." })]));
  $("export").disabled = !talk.messages.length;
  $("export-all").disabled = !talks.size;
}

function openTalk(one) {
  talk = one;
  save("open", one.id);
  showError("chat");
  figures("chat", []);
  show();
  toEnd();
  if ($("talks").matches(":modal")) $("talks").close();
}

export function freshTalk() {
  openTalk(newTalk());
  $("message").focus();
}

function deleteTalk(one) {
  const messages = one.messages;
  cutStates(one, -1);
  drop(one);
  if (one === talk) openTalk(newTalk());
  else showList();
  ($("talk-list").querySelector("button") ?? $("fresh")).focus();
  tell("Talk deleted.", () => { keep(Object.assign(one, { messages })); openTalk(one); });
}

/* What a person does. */

/** Whether what a person asks for must wait: for the text that is generated, or for an edit that would be lost. */
function isOccupied() {
  const isEditing = $("talk").querySelector(".editor") !== null;
  if (isEditing) tell("Save or cancel the edit first.");
  return isEditing || isRunning();
}

/** The focus, if what had it is gone. A field would open a phone's keyboard. */
function refocus() {
  if (document.activeElement === document.body) $(isRunning() ? "chat-stop" : matchMedia("(hover: hover)").matches ? "message" : "scroll").focus();
}

/** Messages are replaced, not changed, so that a state that is being made of them is known to be old. */
function setMessages(messages, count) {
  talk.messages = messages;
  cutStates(talk, count);
  keep(talk);
}

function removeTurn(index) {
  if (isOccupied()) return;
  const before = talk.messages, own = talk;
  const count = before[index].role === "user" && before[index + 1]?.role === "assistant" ? 2 : 1;
  setMessages(before.toSpliced(index, count), index);
  show();
  refocus();
  tell("Deleted.", () => { own.messages = before; keep(own); openTalk(own); });
}

function edit(index) {
  if (isOccupied()) return;
  const message = talk.messages[index], isUser = message.role === "user";
  const input = make("textarea", { className: "text", dir: "auto", value: message.content, rows: Math.min(12, message.content.split("\n").length + 1), ariaLabel: "Edit" });
  const finish = (save) => {
    if (isRunning()) return;
    const content = input.value;
    if (!save || (isUser && !content.trim())) {
      show();
      return $("talk").children[index].querySelector("[title=Edit]").focus();
    }
    setMessages(isUser ? [...talk.messages.slice(0, index), { role: "user", content }] : talk.messages.with(index, { ...message, content }), index);
    show();
    if (isUser) answer();
  };
  const words = !isUser ? "Save" : index + 2 < talk.messages.length ? "Send, and drop what follows" : "Send";
  const row = make("div", { className: "row" }, make("button", { className: "go", textContent: words, onclick: () => finish(true) }),
    make("button", { className: "quiet", textContent: "Cancel", onclick: () => finish(false) }));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); finish(false); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); finish(true); }
  });
  drawn.delete(message);
  $("talk").children[index].replaceChildren(make("div", { className: "editor" }, input, row));
  input.focus();
}

async function again() {
  if (isOccupied()) return;
  const before = talk.messages, own = talk;
  setMessages(before.slice(0, -1), before.length - 1);
  show();
  if (await answer(before)) tell("Another answer.", () => { own.messages = before; cutStates(own, before.length - 1); keep(own); openTalk(own); });
}

async function ask(content) {
  if (!content.trim() || isOccupied()) return;
  const before = talk.messages;
  talk.messages = [...before, { role: "user", content }];
  $("message").value = "";
  remember();
  if (!(await answer(before)) && !$("message").value) {
    $("message").value = content;
    remember();
  }
}

/** Answer what was asked, or continue the answer that was cut; false if nothing came, and then the messages are `before`. */
async function answer(before = talk.messages) {
  const own = talk, last = own.messages[latest()];
  const message = last.role === "assistant" ? { ...last } : { role: "assistant", content: "" };
  own.messages = last.role === "assistant" ? own.messages.with(latest(), message) : [...own.messages, message];
  own.changed = Date.now();
  save("open", own.id);
  const begun = message.content.length, speaker = new Speaker();
  keep(own);
  figures("chat", []);
  show();
  toEnd();
  const live = $("talk").lastChild, text = live.querySelector(".text");
  live.classList.add("live");
  text.replaceChildren(...markdown(message.content));
  let saved = 0, failed = false;
  const add = (more) => {
    message.content += more;
    speaker.hear(message.content.slice(begun));
    text.replaceChildren(...markdown(message.content));
    const now = performance.now();
    if (now - saved > 1000) { saved = now; keep(own); }
  };
  try {
    const request = attempt(own, message, add);
    refocus();
    message.isCut = (await request).reason !== "stop";
  } catch (error) {
    message.isCut = failed = true;
    showError("chat", error);
  }
  speaker.hear(message.content.slice(begun), true);
  const isNothing = failed && message.content.length === begun;
  if (isNothing) own.messages = before;
  keep(own);
  if (!failed) keepState(own);
  const top = $("scroll").scrollTop;
  drawn.delete(message);
  show();
  if (!atEnd) $("scroll").scrollTop = top;
  refocus();
  return !isNothing;
}

/** The request, after the talk's state; if that is lost, with the messages in its place. */
async function attempt(own, message, add) {
  // An empty beginning of an answer is none.
  const asked = message.content ? own.messages : own.messages.slice(0, -1);
  const end = own.messages.length - 2;
  const send = ({ state, messages }) => run("chat", "v1/chat/completions", { ...options(), ...(state && { state: state.id }), messages }, add);
  const first = parts(own, end, asked);
  try {
    return await send(first);
  } catch (error) {
    if (!first.state || !isLostState(error)) throw error;
    own.states = [];
    return send(parts(own, end, asked));
  }
}

/* The input, and what is exported. */

function remember() {
  save("draft", $("message").value);
  $("message").style.height = "auto";
  $("message").style.height = $("message").scrollHeight + "px";
}

const asMarkdown = (one) => `# ${titleOf(one)}\n` + one.messages.map(({ role, content }) => `\n**${role === "user" ? "You" : "Answer"}**\n\n${content}\n`).join("");
const asJson = () => JSON.stringify({ talks: byAge().map((one) => ({ title: titleOf(one), changed: new Date(one.changed).toISOString(), messages: one.messages.map(({ role, content }) => ({ role, content })) })) }, null, 1);

/** Open the talk of the last visit. */
export function startChat() {
  const read = () => {
    talks.clear();
    for (const key of keys("chat.")) {
      const one = load(key);
      if (Array.isArray(one?.messages)) talks.set(one.id, { states: [], ...one });
    }
  };
  read();
  talk = talks.get(load("open")) ?? newTalk();
  $("message").value = load("draft", "");
  addEventListener("storage", (event) => {
    // Another tab has changed its talks.
    if (isRunning() || $("talk").querySelector(".editor") || !event.key?.startsWith("tnllm.chat.")) return;
    read();
    const same = talks.get(talk.id);
    if (same || talk.messages.length) { talk = same ?? newTalk(); show(); } else showList();
  });
  addEventListener("pagehide", () => { if (isRunning()) keep(talk); });
  $("message").addEventListener("input", remember);
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask($("message").value); }
  });
  $("form").addEventListener("submit", (event) => { event.preventDefault(); ask($("message").value); });
  let last = 0;
  $("scroll").addEventListener("scroll", () => {
    const { scrollHeight, scrollTop, clientHeight } = $("scroll");
    // Only a person scrolls up: a window that becomes narrower moves the text down.
    if (scrollHeight - scrollTop - clientHeight < 80) atEnd = true;
    else if (scrollTop < last) atEnd = false;
    last = scrollTop;
    $("down").hidden = atEnd;
  });
  $("down").addEventListener("click", toEnd);
  const observer = new ResizeObserver(follow);
  for (const name of ["scroll", "talk"]) observer.observe($(name));
  $("export").addEventListener("click", () => download("talk.md", asMarkdown(talk), "text/markdown"));
  $("export-all").addEventListener("click", () => download("talks.json", asJson(), "application/json"));
  show();
}
