// The state of this tab that survives a reload: conversation id, transcript, draft and API key.
// The server keys conversations by the browser's cookie and this id, so each tab has its own.

const MAX_TURNS = 100;
const MAX_CHARS = 400_000;

let conversation = read("conversation") ?? "";
let key = read("api-key") ?? "";
if (!conversation) renewConversation();

export function conversationId() {
  return conversation;
}

/** Starts a new conversation, with a new id. */
export function renewConversation() {
  // crypto.randomUUID exists only on https and localhost; this must also work over http in a local network.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  conversation = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  write("conversation", conversation);
}

/**
 * A duplicated tab starts with a copy of this storage. The original tab keeps the conversation;
 * `onTaken` is called in the copy, which must then start a new one.
 * @param {() => void} onTaken
 */
export function claimConversation(onTaken) {
  const channel = new BroadcastChannel("chatstream-conversation");
  const me = crypto.getRandomValues(new Uint32Array(1))[0];
  channel.addEventListener("message", ({ data }) => {
    if (data.conversation !== conversation || data.from === me) return;
    if (data.type === "claim") channel.postMessage({ type: "taken", conversation, from: me, to: data.from });
    if (data.type === "taken" && data.to === me) onTaken();
  });
  channel.postMessage({ type: "claim", conversation, from: me });
}

/** @returns {object[]} the turns as they were saved */
export function loadTurns() {
  try {
    return JSON.parse(read("turns") ?? "[]");
  } catch {
    return [];
  }
}

/** Saves the newest turns that fit: at most MAX_TURNS and about MAX_CHARS characters. */
export function saveTurns(turns) {
  const kept = turns.slice(-MAX_TURNS);
  let text = JSON.stringify(kept);
  while (kept.length > 1 && text.length > MAX_CHARS) {
    kept.shift();
    text = JSON.stringify(kept);
  }
  write("turns", text);
}

export function loadDraft() {
  return read("draft") ?? "";
}

export function saveDraft(text) {
  write("draft", text);
}

export function apiKey() {
  return key;
}

export function saveApiKey(newKey) {
  key = newKey;
  write("api-key", key);
}

// Storage may be full or not permitted; the page then works, but loses its state at a reload.

function read(name) {
  try {
    return sessionStorage.getItem(`chatstream.${name}`);
  } catch {
    return null;
  }
}

function write(name, value) {
  try {
    sessionStorage.setItem(`chatstream.${name}`, value);
  } catch {
    // See above.
  }
}
