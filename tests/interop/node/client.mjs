// The official Node client against a router: node client.mjs BASE_URL API_KEY. Prints one JSON object of what it saw.
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 20_000 });
const messages = [{ role: "user", content: "?" }];
const tools = [{ type: "function", function: { name: "restart", parameters: { type: "object", properties: {} } } }];
const seen = {};

const { data, response } = await client.chat.completions.create({ model: "triage", messages, tools }).withResponse();
seen.chat = data.choices[0].message.content;
seen.version = response.headers.get("x-rayloop-version");
seen.requestId = Boolean(data._request_id);

const stream = await client.chat.completions.create({
  model: "triage",
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
seen.stream = "";
for await (const chunk of stream) {
  seen.stream += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) seen.tokens = chunk.usage.total_tokens;
}

const runner = client.chat.completions.stream({ model: "triage", messages });
seen.runner = (await runner.finalChatCompletion()).choices[0].message.content;

const text = await client.completions.create({ model: "triage", prompt: "?" });
seen.text = text.choices[0].text;

seen.models = [];
for await (const model of client.models.list()) seen.models.push(model.id);

async function failure(call) {
  try {
    await call();
    return null;
  } catch (error) {
    return [error.constructor.name, error.status ?? null, error.code ?? null, error.param ?? null];
  }
}
const create = (body) => client.chat.completions.create({ model: "triage", messages, ...body });
seen.unknownModel = await failure(() => create({ model: "nobody" }));
seen.badRequest = await failure(() => create({ messages: [] }));
const stranger = new OpenAI({ baseURL, apiKey: "rl-wrong", maxRetries: 0 });
seen.wrongKey = await failure(() => stranger.models.list());

const left = await create({ stream: true });
for await (const _ of left) break; // goes away in mid-stream
seen.afterLeaving = (await create({})).choices[0].message.content;

console.log(JSON.stringify(seen));
