// Parses server-sent events from the body of a fetch (EventSource supports neither POST nor headers).
// Follows the HTML standard, section "Interpreting an event stream". Independent of the chat.

/**
 * Yields each complete event. An event cut off by the end of the stream is dropped, as the standard requires.
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
    // A comment (keep-alive) has an empty field name; "id" and "retry" are for reconnecting, which this page does not do.
  }
}

/** Yields lines that end with CR LF, LF or CR, independent of the chunks of the network. */
async function* readLines(body) {
  let rest = "";
  for await (const text of readText(body)) {
    rest += text;
    // A CR at the end may be the first half of a CR LF: keep it for the next chunk.
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
    // Close the connection also when the consumer ends its loop early.
    reader.cancel().catch(() => {});
  }
}

function splitField(line) {
  const colon = line.indexOf(":");
  if (colon < 0) return [line, ""];
  const value = line.slice(colon + 1);
  return [line.slice(0, colon), value.startsWith(" ") ? value.slice(1) : value];
}
