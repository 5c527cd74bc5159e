// Reads server-sent events from the body of a fetch (EventSource can neither POST nor send headers).
// Follows the parsing rules of the HTML standard, section "Interpreting an event stream", and knows nothing of chats.

/**
 * Yields each event as it is complete. An event cut off by the end of the stream is dropped, as the standard demands.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<{type: string, data: string}>}
 */
export async function* readEvents(body) {
  let type = "";
  let data = [];
  for await (const line of readLines(body)) {
    if (line === "") {
      if (data.length > 0) yield { type: type || "message", data: data.join("\n") };
      type = "";
      data = [];
      continue;
    }
    const [field, value] = splitField(line);
    if (field === "event") type = value;
    if (field === "data") data.push(value);
    // A comment (keep-alive) has the empty field name; "id" and "retry" serve a reconnection that this page does not do.
  }
}

/** Lines end with CR LF, LF or CR, wherever the network cut the bytes. */
async function* readLines(body) {
  let rest = "";
  for await (const text of readText(body)) {
    rest += text;
    // A CR at the very end may be the first half of a CR LF: it waits for the next piece.
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    yield* lines;
  }
  if (rest.endsWith("\r")) yield rest.slice(0, -1);
}

async function* readText(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    // Also when the consumer leaves its loop early: the connection is not kept for nobody.
    reader.cancel().catch(() => {});
  }
}

function splitField(line) {
  const colon = line.indexOf(":");
  if (colon < 0) return [line, ""];
  const value = line.slice(colon + 1);
  return [line.slice(0, colon), value.startsWith(" ") ? value.slice(1) : value];
}
