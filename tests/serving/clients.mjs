// npm's `openai` against a running server: `npm install openai && node tests/serving/clients.mjs [http://127.0.0.1:8000/v1]`.
import assert from "node:assert/strict";
import OpenAI, { BadRequestError, NotFoundError } from "openai";

const baseURL = process.argv[2] ?? "http://127.0.0.1:8000/v1";
const client = new OpenAI({ baseURL, apiKey: process.env.TNLLM_API_KEY ?? "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const asked = { model, max_tokens: 12, seed: 1, temperature: 0.8 };
const messages = [{ role: "user", content: "Tell me of the sea." }];

const checks = {
  "models": async () => assert.equal((await client.models.retrieve(model)).id, model),
  "chat, and the same streamed": async () => {
    const whole = (await client.chat.completions.create({ ...asked, messages })).choices[0].message.content;
    let text = "", usage = null;
    const stream = await client.chat.completions.create({
      ...asked, messages, stream: true, stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole);
    assert.ok(usage.completion_tokens <= 12);
  },
  "the stream helper": async () => {
    const stream = client.chat.completions.stream({ ...asked, messages });
    assert.equal(typeof (await stream.finalContent()), "string");
  },
  "completions, n, stop, logprobs": async () => {
    const done = await client.completions.create({ ...asked, prompt: "The", n: 2, stop: ["."], logprobs: 2 });
    assert.equal(done.choices.length, 2);
    for (const { text, logprobs } of done.choices) {
      assert.ok(!text.includes("."));
      logprobs.tokens.forEach((token, index) => assert.ok(token in logprobs.top_logprobs[index]));
    }
  },
  "chat, n and logprobs": async () => {
    const done = await client.chat.completions.create({ ...asked, messages, n: 2, logprobs: true, top_logprobs: 3 });
    assert.equal(done.choices.length, 2);
    assert.ok(done.choices[0].logprobs.content.every((entry) => entry.top_logprobs.length === 3));
  },
  "its own answer sent back": async () => {
    const { message } = (await client.chat.completions.create({ ...asked, messages })).choices[0];
    await client.chat.completions.create({ ...asked, messages: [...messages, message, ...messages] });
  },
  "a stream that is left": async () => {
    const stream = await client.completions.create({ model, prompt: "The", max_tokens: 5000, stream: true });
    for await (const _ of stream) break;
  },
  "errors": async () => {
    await assert.rejects(client.completions.create({ ...asked, prompt: "a", temperature: -1 }), (error) =>
      error instanceof BadRequestError && error.param === "temperature");
    await assert.rejects(client.completions.create({ model: "other", prompt: "a" }), NotFoundError);
    await assert.rejects(client.chat.completions.create({ ...asked, messages, tools: [{ type: "function" }] }),
      BadRequestError);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`ok: ${name}`);
}
