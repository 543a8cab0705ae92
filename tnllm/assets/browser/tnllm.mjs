// A model in the browser, from the files that `tnllm convert MODEL FOLDER --to web` writes.
//
//   import { load } from "./tnllm.mjs";
//   const model = await load(".");
//   for await (const { text, id } of model.generate("Once upon a time", { limit: 40 })) show(text);

import * as ort from "./ort.wasm.min.mjs";

const SPACE = "\u2581"; // how SentencePiece spells a space
const [UNKNOWN, CONTROL, USER_DEFINED, BYTE] = [2, 3, 4, 6]; // its types of pieces
const CHUNK = 128; // tokens of a prompt read at once: attention within them is quadratic
const utf8 = new TextEncoder();
const newDecoder = () => new TextDecoder("utf-8", { ignoreBOM: true });

// Pairs [field, value] of a protobuf message: a number, or the bytes of what has a length.
function* fields(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint(), kind = key & 7;
    const size = kind === 0 ? 0 : kind === 2 ? varint() : kind === 5 ? 4 : 8;
    if (kind === 0) yield [key >> 3, varint()];
    else yield [key >> 3, kind === 5 ? view.getFloat32(at, true) : bytes.subarray(at, at + size)];
    at += size;
  }
}

// Pairs of neighbours: the best score is taken first, of equals the one furthest left.
class Heap {
  #items = [];

  #precedes(a, b) {
    return a.score > b.score || (a.score === b.score && a.left < b.left);
  }

  push(item) {
    let at = this.#items.push(item) - 1;
    for (let up; at && this.#precedes(item, this.#items[(up = (at - 1) >> 1)]); at = up) this.#items[at] = this.#items[up];
    this.#items[at] = item;
  }

  pop() {
    const items = this.#items, top = items[0], item = items.pop();
    let at = 0;
    for (let down; (down = 2 * at + 1) < items.length; at = down) {
      if (down + 1 < items.length && this.#precedes(items[down + 1], items[down])) down++;
      if (!this.#precedes(items[down], item)) break;
      items[at] = items[down];
    }
    if (items.length) items[at] = item;
    return top;
  }
}

// SentencePiece's byte pair encoding: of all neighbours the pair of the best score is joined, the first of equals.
export class Tokenizer {
  constructor(model) {
    this.bytes = []; // of each id
    this.known = new Map(); // piece → [id, score]
    this.fallback = new Map(); // byte → id
    this.addsSpace = true;
    const alone = [];
    for (const [field, value] of fields(model)) {
      const parts = field === 1 || field === 3 ? Object.fromEntries(fields(value)) : {};
      if (field === 3) this.addsSpace = parts[3] !== 0;
      if (field !== 1) continue;
      const piece = newDecoder().decode(parts[1]), type = parts[3] ?? 1, id = this.bytes.length;
      const byte = type === BYTE ? parseInt(piece.slice(3), 16) : 0;
      if (type === BYTE) this.fallback.set(byte, id);
      else if (type === UNKNOWN) this.unknown = id;
      else if (type !== CONTROL) this.known.set(piece, [id, parts[2] ?? 0]);
      if (type === USER_DEFINED) alone.push(piece);
      const text = type === UNKNOWN ? " \u2047 " : type === CONTROL ? "" : piece.replaceAll(SPACE, " ");
      this.bytes.push(type === BYTE ? Uint8Array.of(byte) : utf8.encode(text));
    }
    // These are matched before any merge, the longest first.
    const escaped = alone.sort((a, b) => b.length - a.length).map((piece) => piece.replace(/[\\^$.*+?()[\]{}|\/]/g, "\\$&"));
    this.alone = new RegExp(`(${escaped.join("|") || "$^"})`, "u");
    // Characters that no piece has side by side are never joined: texts fall into short runs.
    this.neighbours = new Set();
    for (const piece of this.known.keys()) {
      const characters = [...piece];
      for (let i = 1; i < characters.length; i++) this.neighbours.add(characters[i - 1] + characters[i]);
    }
  }

  encode(text) {
    if (this.addsSpace || this.fallback.size < 256) return text ? this.#encode((this.addsSpace ? " " : "") + text) : [];
    // The character itself goes through its bytes.
    return text.split(SPACE).flatMap((part, i) => (i ? this.#spell(SPACE) : []).concat(this.#encode(part)));
  }

  #encode(text) {
    const ids = [];
    const join = (characters) => {
      const run = this.#merge(characters);
      for (const piece of run) {
        const [id] = this.known.get(piece) ?? [];
        if (id !== undefined) ids.push(id);
        else if (this.fallback.size === 256) ids.push(...this.#spell(piece));
        else if (ids.at(-1) !== this.unknown) ids.push(this.unknown);
      }
    };
    text.replaceAll(" ", SPACE).split(this.alone).forEach((part, i) => {
      if (i % 2) return join([part]);
      let run = [];
      for (const character of part) {
        if (run.length && !this.neighbours.has(run.at(-1) + character)) join(run.splice(0));
        run.push(character);
      }
      join(run);
    });
    return ids;
  }

  #merge(run) {
    const pairs = new Heap(), before = run.map((_, i) => i - 1), after = run.map((_, i) => i + 1);
    const consider = (left) => {
      const piece = run[left] + run[after[left]], score = this.known.get(piece)?.[1];
      if (score !== undefined) pairs.push({ score, left, piece });
    };
    for (let i = 0; i + 1 < run.length; i++) consider(i);
    for (let pair; (pair = pairs.pop()); ) {
      const { left, piece } = pair, right = after[left];
      if (!run[left] || run[left] + run[right] !== piece) continue; // joined meanwhile
      [run[left], run[right], after[left]] = [piece, "", after[right]];
      if (left > 0) consider(before[left]);
      if (after[left] < run.length) {
        before[after[left]] = left;
        consider(left);
      }
    }
    return run.filter(Boolean);
  }

  #spell(piece) {
    return Array.from(utf8.encode(piece), (byte) => this.fallback.get(byte));
  }
}

// Logits with a repetition penalty → a token id; temperature 0 is the most likely one.
function choose(logits, seen, { temperature, topP, penalty }) {
  for (const id of seen) logits[id] *= logits[id] > 0 ? 1 / penalty : penalty;
  const top = logits.reduce((best, value, id) => (value > logits[best] ? id : best), 0);
  if (!(temperature > 0)) return top;
  const weights = logits.map((value) => Math.exp((value - logits[top]) / temperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const order = [...weights.keys()].filter((id) => weights[id] > 1e-6).sort((a, b) => weights[b] - weights[a]);
  // The fewest tokens that reach topP of the probability, and one of them by its weight.
  let kept = 0, end = 0;
  while (end < order.length && kept < topP * total) kept += weights[order[end++]];
  let at = Math.random() * kept;
  return order.slice(0, end).find((id) => (at -= weights[id]) <= 0) ?? top;
}

class Model {
  constructor(session, tokenizer, settings) {
    Object.assign(this, { session, tokenizer, settings });
  }

  // Yields { id, text } for each new token. The text of a token may be empty: half a character.
  async *generate(prompt, options = {}) {
    const { limit = 200, temperature = 0, topP = 1 } = options;
    const penalty = options.penalty ?? this.settings.repetition_penalty ?? 1;
    const ids = this.tokenizer.encode(prompt);
    if (this.settings.add_bos_token || !ids.length) ids.unshift(this.settings.bos_token_id);
    // A matrix for each head and layer, of the same size after ten tokens and after a million. Only a hybrid's softmax
    // layers have caches that grow from nothing: their length is a name.
    let position = 0, state = {}, logits;
    for (const { name, shape } of this.session.inputMetadata.slice(2)) {
      const size = [1, ...shape.slice(1).map((n) => (typeof n === "number" ? n : 0))];
      state[name] = new ort.Tensor("float32", new Float32Array(size.reduce((a, b) => a * b)), size);
    }
    const read = async (part) => {
      const tokens = new ort.Tensor("int64", BigInt64Array.from(part, BigInt), [1, part.length]);
      const start = new ort.Tensor("int64", BigInt64Array.of(BigInt(position)), [1]);
      const result = await this.session.run({ tokens, position: start, ...state });
      position += part.length;
      state = Object.fromEntries(Object.keys(state).map((name) => [name, result[`new_${name}`]]));
      const size = result.logits.dims[2];
      logits = result.logits.data.slice(-size);
    };
    for (let at = 0; at < ids.length; at += CHUNK) await read(ids.slice(at, at + CHUNK));
    const seen = new Set(ids), decoder = newDecoder();
    for (let count = 0; count < limit; count++) {
      const id = choose(logits, seen, { temperature, topP, penalty });
      if ([this.settings.eos_token_id].flat().includes(id)) break;
      seen.add(id);
      yield { id, text: decoder.decode(this.tokenizer.bytes[id] ?? new Uint8Array(), { stream: true }) };
      if (count + 1 < limit) await read([id]);
    }
  }
}

export async function load(folder) {
  ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
  const get = async (name, as) => {
    const response = await fetch(`${folder}/${name}`);
    if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
    return response[as]();
  };
  const [graph, pieces, settings] = await Promise.all([
    get("model.onnx", "arrayBuffer"), get("tokenizer.model", "arrayBuffer"), get("generation_config.json", "json"),
  ]);
  const session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
  return new Model(session, new Tokenizer(new Uint8Array(pieces)), settings);
}
