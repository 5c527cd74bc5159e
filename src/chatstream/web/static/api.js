// The page's HTTP calls. All URLs are relative, so the page works under any prefix.
// Knows HTTP and the server's error bodies; does not touch the document.

import { readEvents } from "./sse.js";
import * as tab from "./tab.js";

/** The server's error: a status before the stream, or an `error` event with status 0. */
export class Refusal extends Error {
  /** @param {{status: number, code: string, message: string, retryAfterS: number | null}} refusal */
  constructor({ status, code, message, retryAfterS }) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

/** The connection failed, or the stream ended without `done` or `error`. */
export class ConnectionLost extends Error {}

/**
 * Sends a message and yields the server's events, each as an object with its `type`; the last is `done` or `error`.
 * Throws `Refusal` or `ConnectionLost`; after an abort of the signal, the error of fetch.
 * @param {{user_input: string | null, regenerate: boolean}} question
 * @param {AbortSignal} signal
 */
export async function* ask(question, signal) {
  const response = await call("chat_stream", {
    method: "POST",
    headers: { Accept: "text/event-stream", "Content-Type": "application/json" },
    body: JSON.stringify(question),
    signal,
  });
  if (!response.headers.get("content-type")?.startsWith("text/event-stream")) throw new ConnectionLost();
  try {
    for await (const { type, data } of readEvents(response.body)) {
      yield { type, ...JSON.parse(data) };
      if (type === "done" || type === "error") return;
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ConnectionLost();
  }
  throw new ConnectionLost();
}

/** Cancels a waiting or running request. Aborting its stream does so too, except behind a proxy that keeps it open. */
export async function cancel(requestId) {
  await call(`requests/${encodeURIComponent(requestId)}`, { method: "DELETE", keepalive: true });
}

/** Deletes this tab's conversation on the server. */
export async function clearContext() {
  await call("clear_context", { method: "POST", signal: AbortSignal.timeout(10_000) });
}

/** @returns {Promise<string | undefined>} the server's model */
export async function modelId() {
  const response = await call("v1/models", { signal: AbortSignal.timeout(10_000) });
  return (await response.json()).data?.[0]?.id;
}

/** @returns {Promise<{processing: number, waiting: number, max_processing: number}>} summed over the workers */
export async function load() {
  const response = await call("get_load", { signal: AbortSignal.timeout(10_000) });
  const workers = (await response.json()).chatstream_workers;
  const sum = (field) => workers.reduce((total, worker) => total + worker[field], 0);
  return { processing: sum("processing"), waiting: sum("waiting"), max_processing: sum("max_processing") };
}

async function call(path, options) {
  const headers = { ...options.headers, "X-ChatStream-Conversation": tab.conversationId() };
  if (tab.apiKey()) headers.Authorization = `Bearer ${tab.apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ConnectionLost();
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** Makes a `Refusal` of the native body `{"error", "code", "message"}`, the OpenAI body `{"error": {…}}` or any other. */
async function refusal(response) {
  const body = (await response.json().catch(() => null)) ?? {};
  const error = typeof body.error === "object" && body.error ? body.error : body;
  const seconds = Number(response.headers.get("retry-after") ?? NaN);
  return new Refusal({
    status: response.status,
    code: String(error.code ?? `http_${response.status}`),
    message: String(error.message ?? response.statusText),
    retryAfterS: Number.isFinite(seconds) ? Math.max(1, Math.ceil(seconds)) : null,
  });
}
