// An agent in Node that reports one answer, with a tool call, to Rayloop over OTLP. No packages needed.
//
//   RAYLOOP_ENABLED=true RAYLOOP_URL=http://127.0.0.1:8000 RAYLOOP_API_KEY=rl-… node docs/examples/agent.mjs
//
// With RAYLOOP_ENABLED unset nothing is sent. A service that fails never fails the agent: one warning, and on.
import { randomBytes } from "node:crypto";

const enabled = process.env.RAYLOOP_ENABLED === "true";
const url = process.env.RAYLOOP_URL ?? "http://127.0.0.1:8000";
const key = process.env.RAYLOOP_API_KEY ?? "";
const user = process.env.AGENT_USER ?? "ada";
let warned = false;

const hex = (bytes) => randomBytes(bytes).toString("hex");
const nanoseconds = () => (BigInt(Date.now()) * 1_000_000n).toString();

function anyValue(value) {
  if (typeof value === "string") return { stringValue: value };
  if (typeof value === "boolean") return { boolValue: value };
  if (Number.isInteger(value)) return { intValue: String(value) };
  if (typeof value === "number") return { doubleValue: value };
  return { stringValue: JSON.stringify(value) };
}

const attributes = (values) => Object.entries(values).map(([key, value]) => ({ key, value: anyValue(value) }));

class Trace {
  spans = [];
  traceId = hex(16);

  // Runs `work(set)` as a span; `set` adds attributes. Errors pass through, and are noted on the span.
  async span(name, parentSpanId, values, work) {
    const span = { traceId: this.traceId, spanId: hex(8), name, kind: 1, startTimeUnixNano: nanoseconds() };
    if (parentSpanId) span.parentSpanId = parentSpanId;
    const gathered = { ...values };
    try {
      return await work((more) => Object.assign(gathered, more), span.spanId);
    } catch (error) {
      gathered["error.type"] = error.name;
      span.status = { code: 2, message: String(error.message) };
      throw error;
    } finally {
      span.endTimeUnixNano = nanoseconds();
      span.attributes = attributes(gathered);
      this.spans.push(span);
    }
  }

  async send(service) {
    if (!enabled) return;
    const resource = { attributes: attributes({ "service.name": service }) };
    const body = { resourceSpans: [{ resource, scopeSpans: [{ spans: this.spans }] }] };
    const answer = await post("/v1/traces", body);
    if (answer?.partialSuccess) warn(answer.partialSuccess.errorMessage);
  }
}

async function post(path, body) {
  try {
    const response = await fetch(url + path, {
      method: "POST",
      headers: { "content-type": "application/json", authorization: `Bearer ${key}` },
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(5000),
    });
    const answer = await response.json();
    if (response.ok) return answer;
    warn(answer.error.message);
  } catch (error) {
    warn(error.message);
  }
}

function warn(message) {
  if (!warned) console.error(`rayloop: ${message}`);
  warned = true;
}

// The agent: it asks a model, calls the tool the model wants, and asks again. Both are stand-ins here.
const text = (role, content) => ({ role, parts: [{ type: "text", content }] });
const question = text("user", "Is order 7 on its way?");
const wish = { role: "assistant", parts: [{ type: "tool_call", id: "call_1", name: "find_order", arguments: { order: 7 } }] };
const findOrder = async ({ order }) => ({ order, status: "shipped" });

const trace = new Trace();
const answer = await trace.span(
  "invoke_agent orders",
  null,
  { "gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "orders", "user.id": user, "gen_ai.conversation.id": "c-1" },
  async (_set, agent) => {
    const chat = { "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "orders" };
    await trace.span("chat orders", agent, { ...chat, "gen_ai.input.messages": [question] }, async (set) => {
      set({ "gen_ai.output.messages": [{ ...wish, finish_reason: "tool_call" }] });
    });
    const tool = { "gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "find_order", "gen_ai.tool.call.id": "call_1" };
    const found = await trace.span("execute_tool find_order", agent, tool, async (set) => {
      set({ "gen_ai.tool.call.arguments": { order: 7 } });
      const result = await findOrder({ order: 7 });
      set({ "gen_ai.tool.call.result": result });
      return result;
    });
    const result = { role: "tool", parts: [{ type: "tool_call_response", id: "call_1", response: found }] };
    return trace.span("chat orders", agent, { ...chat, "gen_ai.input.messages": [question, wish, result] }, async (set, span) => {
      const said = text("assistant", "Yes, it was shipped.");
      set({ "gen_ai.output.messages": [{ ...said, finish_reason: "stop" }], "gen_ai.request.temperature": 0.2 });
      set({ "rayloop.interaction_id": `orders-${trace.traceId}-${span}` });
      return { id: `orders-${trace.traceId}-${span}`, said: said.parts[0].content };
    });
  },
);
console.log(answer.said);

await trace.send("order-agent");
if (enabled) await post("/v1/feedback", { event_id: `${answer.id}-up`, interaction_id: answer.id, type: "thumbs_up", user });
