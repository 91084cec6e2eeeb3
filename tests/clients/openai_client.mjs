// The official JavaScript client against a running server: openai_client.mjs URL MODEL.
import assert from 'node:assert/strict';
import OpenAI from 'openai';
import { VERSION } from 'openai/version';

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'unused', maxRetries: 0 });
const messages = [{ role: 'user', content: 'What is the capital of France?' }];
const base = { model, messages, max_tokens: 24, temperature: 0 };

const whole = await client.chat.completions.create({ ...base, logprobs: true, top_logprobs: 2 });
let text = '';
const logprobs = [];
const stream = await client.chat.completions.create({
  ...base, logprobs: true, top_logprobs: 2, stream: true,
});
for await (const chunk of stream) {
  const [choice] = chunk.choices;
  text += choice.delta.content ?? '';
  logprobs.push(...(choice.logprobs?.content ?? []).map((e) => e.logprob));
}
assert.match(text, /Paris/);
assert.equal(text, whole.choices[0].message.content);
assert.deepEqual(logprobs, whole.choices[0].logprobs.content.map((e) => e.logprob));

await assert.rejects(client.chat.completions.create({ ...base, top_p: 7 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, 'top_p');
  return true;
});

const long = await client.chat.completions.create({
  ...base, max_tokens: 400, ignore_eos: true, stream: true,
});
for await (const chunk of long) {
  if (chunk.choices[0].delta.content) break; // leaves the loop, which aborts the request
}
console.log(`openai ${VERSION} (npm): whole, streamed, errors, abort`);
