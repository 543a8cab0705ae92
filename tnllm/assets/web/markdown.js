// Markdown as elements. A model's text is only ever the text of an element or a checked address, so no HTML in it is executed.

import { Lexer } from "./marked.js";
import { copy, icon, make } from "./page.js";

const MARKS = new Set(["strong", "em", "del"]);
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", "#39": "'" };
const plain = (text) => text.replace(/&(amp|lt|gt|quot|apos|nbsp|#39);/g, (_, name) => ENTITIES[name]);

// Of the heading before. A level is never skipped, whatever the model writes, so that the page can be read by its headings.
let level;

// What a model that repeats itself may write, and the parser's time grows with the square of: marks of emphasis in one
// paragraph, quotes and lists in each other. Such a text is shown as it is.
const MOST_MARKS = 1000, NESTED = /^[ \t]*(?:>[ \t]*|(?:[-*+]|\d{1,9}[.)])[ \t]+){50}/m;
const isStrange = (text) => NESTED.test(text) || text.split(/\n\s*\n/).some((part) => part.split(/[*_]/).length > MOST_MARKS);
const asIs = (text) => make("p", { textContent: text, dir: "auto", className: "as-is" });

/** The elements of a text. */
export function markdown(text) {
  level = 1;
  return isStrange(text) ? [asIs(text)] : elements(new Lexer({ gfm: true, breaks: true }).lex(text));
}

const elements = (tokens = []) => tokens.map(element).filter((one) => one !== null);
const inner = (token) => (token.tokens ? elements(token.tokens) : [plain(token.text)]);

function element(token) {
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "paragraph":
      return make("p", { dir: "auto" }, ...inner(token));
    case "heading":
      level = Math.min(token.depth + 1, level + 1, 6);
      return make("h" + level, { dir: "auto" }, ...inner(token));
    case "blockquote":
      return make("blockquote", { dir: "auto" }, ...inner(token));
    case "br":
      return make("br");
    case "hr":
      return make("hr");
    case "code":
      return code(token);
    case "codespan":
      return make("code", { textContent: token.text });
    case "link":
    case "image":
      return link(token);
    case "list":
      return make(token.ordered ? "ol" : "ul", token.ordered ? { start: Number(token.start) } : {},
        ...token.items.map((item) => make("li", { dir: "auto" }, ...elements(item.tokens))));
    case "checkbox":
      return token.checked ? "☑ " : "☐ ";
    case "table":
      return table(token);
    case "text":
      return make("span", {}, ...inner(token));
    case "html":
      return token.block ? asIs(token.raw.trim()) : token.raw;
    default:
      return MARKS.has(token.type) ? make(token.type, {}, ...inner(token)) : plain(token.text ?? token.raw);
  }
}

/** A link, for addresses that lead to a page or a mail; an image is a link to it, as nothing is loaded from elsewhere. */
function link(token) {
  const words = token.type === "image" ? [token.text || token.href] : inner(token);
  if (!/^(https?:\/\/|mailto:)/i.test(token.href)) return make("span", { title: token.href }, ...words);
  return make("a", { href: token.href, target: "_blank", rel: "noopener noreferrer" }, ...words);
}

function code(token) {
  const language = /^\S*/.exec(token.lang ?? "")[0];
  const button = make("button", { className: "icon", title: "Copy code", ariaLabel: "Copy code", onclick: () => copy(token.text) }, icon("copy"));
  const text = make("pre", { tabIndex: 0, dir: "ltr" }, make("code", { textContent: token.text }));
  return make("div", { className: "code" }, make("div", { className: "code-head" }, make("span", { textContent: language }), button), text);
}

function table(token) {
  const row = (tag, cells) => make("tr", {}, ...cells.map((cell) => make(tag, { dir: "auto", className: cell.align ?? "" }, ...inner(cell))));
  const body = make("tbody", {}, ...token.rows.map((cells) => row("td", cells)));
  return make("div", { className: "table", tabIndex: 0 }, make("table", {}, make("thead", {}, row("th", token.header)), body));
}
