// The chat page: one conversation, at most one active request, and the user's actions.
// Texts are in i18n.js, drawing in turn.js, HTTP in api.js, storage in tab.js.

import * as api from "./api.js";
import { language, switchLanguage, translate, words } from "./i18n.js";
import * as tab from "./tab.js";
import { TurnView, isBusy, reasonText, retryText } from "./turn.js";

const LOAD_EVERY_MS = 3000;
const NEAR_THE_END_PX = 60;
const UNANSWERED = { answer: "", waitedS: null, tokens: null, finish: null, notice: null };
const DEMO_MODEL = "chatstream-demo";

const page = Object.fromEntries(
  ["scroller", "turns", "welcome", "demo", "examples", "model", "load", "language", "new-chat", "to-newest", "composer", "input",
    "send", "stop", "status", "key-dialog", "key-form", "key", "key-wrong", "key-cancel"]
    .map((id) => [id, document.getElementById(id)]),
);

/** @type {TurnView[]} */
let views = [];
/**
 * @typedef {object} Run  The active request.
 * @property {TurnView} view
 * @property {import("./turn.js").Turn} before  A copy of the turn from before this attempt.
 * @property {AbortController} abort
 * @property {string | null} requestId
 * @property {boolean} started
 * @property {boolean} stopped  By the user.
 */
/** @type {Run | null} */
let run = null;
let load = null;
/** Whether the view follows the end of the conversation: off when the user scrolls up, on again at the end. */
let isPinned = true;
let lastScrollTop = 0;

// ---- requests -----------------------------------------------------------------------------------------------------

function send() {
  const text = page.input.value.trim();
  if (text === "" || run) return;
  setInput("");
  sendText(text);
}

function sendText(text) {
  const previous = views.at(-1);
  // Drop the notice of a failed regeneration, but keep that of a message that was not sent.
  if (previous?.turn.state === "done") previous.turn.notice = null;
  const view = addView({ text, ...UNANSWERED, state: "unsent", isKept: false });
  previous?.draw(false);
  answer(view);
}

/** Requests an answer for the last turn, or a new one, and follows the request to its end. */
async function answer(view) {
  const { turn } = view;
  const attempt = { view, before: { ...turn }, abort: new AbortController(), requestId: null, started: false, stopped: false };
  run = attempt;
  Object.assign(turn, UNANSWERED, { state: "sending" });
  isPinned = true;
  showState();
  keepFocus();
  try {
    await runRequest(attempt);
    turn.isKept ||= turn.answer !== "";
  } catch (error) {
    settle(attempt, error);
    announce(turn.notice ? `${reasonText(turn.notice)} ${retryText(turn.notice)}`.trim() : words().stopped);
  } finally {
    // A new chat may have started meanwhile.
    if (run === attempt) run = null;
    showState();
    saveTurns();
    keepFocus();
    watchLoad();
  }
}

/** Updates the turn after an attempt without a complete answer. */
function settle(attempt, error) {
  const { turn } = attempt.view;
  turn.notice = noticeOf(attempt, error);
  if (turn.answer !== "") {
    turn.state = attempt.stopped ? "stopped" : "broken";
    // The server keeps a partial answer after a disconnect or a cancellation, but not after a failure of the model.
    turn.isKept ||= !(error instanceof api.Refusal) || error.code === "cancelled";
  } else {
    // Restore the previous answer: a failed regeneration does not lose it.
    Object.assign(turn, attempt.before, { notice: turn.notice });
  }
}

/** Runs the request to its end; asks for an API key, or sends the whole message again, where that is needed. */
async function runRequest(attempt) {
  const { turn } = attempt.view;
  let question = turn.isKept ? { user_input: null, regenerate: true } : { user_input: turn.text, regenerate: false };
  for (;;) {
    try {
      for await (const event of api.ask(question, attempt.abort.signal)) onEvent(attempt, event);
      return;
    } catch (error) {
      const isRefusal = error instanceof api.Refusal && !attempt.started;
      if (isRefusal && question.regenerate && error.code === "invalid_request") {
        // The server no longer has the conversation: it was restarted, or the session ended.
        question = { user_input: turn.text, regenerate: false };
      } else if (!(isRefusal && isAboutKey(error) && (await askForKey()))) {
        throw error;
      }
    }
  }
}

function onEvent(attempt, event) {
  const { view } = attempt;
  const { turn } = view;
  attempt.requestId = event.request_id ?? attempt.requestId;
  switch (event.type) {
    case "queued":
      turn.waitsFor = event.waits_for;
      turn.eta = event.eta_seconds === null ? null : { etaS: event.eta_seconds, p90S: event.eta_p90_seconds, at: Date.now() };
      announcePosition(turn, event.position, event.position_kind === "estimate");
      break;
    case "started":
      attempt.started = true;
      Object.assign(turn, { state: "answering", waitedS: event.waited_seconds });
      announce(words().answering);
      break;
    case "token":
      addText(view, event.text);
      return;
    case "done":
      Object.assign(turn, { state: "done", finish: event.finish_reason, tokens: event.usage?.completion_tokens ?? null });
      announce(words().answered);
      break;
    case "error":
      throw new api.Refusal({ status: 0, code: event.code, message: event.message, retryAfterS: null });
  }
  showState();
}

function announcePosition(turn, position, isEstimate) {
  const hasChanged = turn.state !== "waiting" || turn.position !== position || turn.isEstimate !== isEstimate;
  if (hasChanged) announce(words().position(position, isEstimate));
  Object.assign(turn, { state: "waiting", position, isEstimate });
}

/** Draws text once per frame, however fast tokens arrive; a hidden tab has no frames, and `turn` buffers the text. */
function addText(view, text) {
  const { turn } = view;
  const isFirst = turn.answer === "";
  turn.answer += text;
  if (isFirst) showState();
  else if (!view.isFrameAsked) {
    view.isFrameAsked = true;
    requestAnimationFrame(() => {
      view.isFrameAsked = false;
      view.showNewText();
      followEnd();
    });
  }
}

/** The reason for an incomplete answer; null if the user stopped it. */
function noticeOf(attempt, error) {
  if (attempt.stopped) return attempt.view.turn.answer === "" ? notice(attempt.started ? "stopped_early" : "left") : null;
  if (error instanceof api.Refusal) {
    const retryAt = error.retryAfterS === null ? null : Date.now() + error.retryAfterS * 1000;
    return { ...notice(error.code, error.message), retryAt, isFinal: error.status === 400 || error.status === 413 };
  }
  if (!(error instanceof api.ConnectionLost)) console.error(error);
  return notice(attempt.requestId ? "connection_lost" : "unreachable");
}

const notice = (code, message = "") => ({ code, message, retryAt: null, isFinal: false });

/** Leaves the queue or stops the answer. */
function stop() {
  if (!run) return;
  run.stopped = true;
  run.abort.abort();
  if (run.requestId) api.cancel(run.requestId).catch(() => {});
}

function newChat() {
  stop();
  run = null;
  api.clearContext().catch(() => {});
  tab.renewConversation();
  showTurns([]);
  saveTurns();
  focusInput();
}

/** Moves the text of an unsent message back to the input. */
function edit(view) {
  views.pop();
  view.element.remove();
  setInput([view.turn.text, page.input.value].filter((text) => text !== "").join("\n"));
  views.at(-1)?.draw(true);
  showState();
  saveTurns();
  page.input.focus();
}

async function copy(view) {
  const text = view.turn.answer;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Not permitted, or missing: the clipboard API exists only on https and localhost.
    copyFromField(text);
  }
  announce(words().copied);
}

function copyFromField(text) {
  const field = document.createElement("textarea");
  const focused = document.activeElement;
  field.value = text;
  field.className = "unseen";
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
  focused?.focus();
}

// ---- the API key --------------------------------------------------------------------------------------------------

const isAboutKey = (error) => error.status === 401 || (error.status === 403 && tab.apiKey() !== "");

/** @returns {Promise<boolean>} whether a key was given */
function askForKey() {
  const dialog = page["key-dialog"];
  page["key-wrong"].hidden = tab.apiKey() === "";
  page.key.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
  });
}

function onKeyGiven() {
  tab.saveApiKey(page.key.value.trim());
  page["key-dialog"].close("given");
  showModel();
  isLoadRefused = false;
}

// ---- display ------------------------------------------------------------------------------------------------------

/** Draws everything except the older turns. */
function showState() {
  views.at(-1)?.draw(true);
  page.welcome.hidden = views.length > 0;
  page.send.hidden = run !== null;
  page.stop.hidden = run === null;
  const turn = run?.view.turn;
  page.stop.textContent = turn?.state === "waiting" ? words().leave : words().stop;
  document.title = titleOf(turn);
  followEnd();
}

function titleOf(turn) {
  if (turn?.state === "waiting") return words().titleWaiting(turn.position, turn.isEstimate);
  return turn?.state === "answering" ? words().titleAnswering : words().title;
}

function addView(turn) {
  const view = new TurnView(turn, { tryAgain, edit, copy });
  views.push(view);
  page.turns.append(view.element);
  return view;
}

function tryAgain(view) {
  if (!run) answer(view);
}

function showTurns(turns) {
  views = [];
  page.turns.replaceChildren();
  turns.forEach(addView);
  views.forEach((view) => view.draw(false));
  showState();
}

function announce(text) {
  page.status.textContent = text;
}

function followEnd() {
  if (isPinned && views.length > 0) page.scroller.scrollTop = page.scroller.scrollHeight;
  page["to-newest"].hidden = isPinned;
}

function onScroll() {
  const { scrollHeight, scrollTop, clientHeight } = page.scroller;
  const toEndPx = scrollHeight - scrollTop - clientHeight;
  // Any upward scroll unpins, however small: slow scrolling must not be undone by the next token.
  isPinned = toEndPx < 2 || (scrollTop >= lastScrollTop && (isPinned || toEndPx < NEAR_THE_END_PX));
  lastScrollTop = scrollTop;
  page["to-newest"].hidden = isPinned;
}

function setInput(text) {
  page.input.value = text;
  onInput();
}

function onInput() {
  tab.saveDraft(page.input.value);
  page.input.style.height = "auto";
  page.input.style.height = `${page.input.scrollHeight}px`;
  followEnd();
}

/** Moves the focus to the input when the focused button has been removed. */
function keepFocus() {
  if (document.activeElement === document.body) focusInput();
}

/** Focuses the input, except on a touch screen, where the on-screen keyboard would cover the answer. */
function focusInput() {
  if (!matchMedia("(pointer: coarse)").matches) page.input.focus();
}

async function showModel() {
  const model = await api.modelId().catch(() => undefined);
  page.model.textContent = model ?? "";
  page.model.parentElement.hidden = model === undefined;
  page.demo.hidden = page.examples.hidden = model !== DEMO_MODEL;
}

function showExamples() {
  page.examples.replaceChildren(
    ...words().examples.map((text) => {
      const example = document.createElement("button");
      example.type = "button";
      example.className = "example";
      example.textContent = text;
      example.addEventListener("click", () => !run && sendText(text));
      return example;
    }),
  );
}

function showLanguage() {
  translate(document);
  page.language.textContent = words().otherLanguage;
  page.language.lang = language === "en" ? "ja" : "en";
  views.forEach((view) => view.draw(false));
  showExamples();
  showState();
  showLoad();
}

// ---- the server's load --------------------------------------------------------------------------------------------

let loadTimer;
let isLoadRefused = false;

/** Polls while the page is visible, until a request fails; called again after an answer or when the page is shown. */
async function watchLoad() {
  clearTimeout(loadTimer);
  if (document.hidden || isLoadRefused) return;
  try {
    load = await api.load();
    clearTimeout(loadTimer);
    loadTimer = setTimeout(watchLoad, LOAD_EVERY_MS);
  } catch (error) {
    load = null;
    isLoadRefused = error instanceof api.Refusal && error.status < 500;
  }
  showLoad();
}

function showLoad() {
  page.load.hidden = load === null;
  page.load.textContent = load ? words().load(load) : "";
  page.load.classList.toggle("full", load !== null && load.processing >= load.max_processing);
}

// ---- storage ------------------------------------------------------------------------------------------------------

function saveTurns() {
  // Save the turn from before an attempt without text: a reload now ends the attempt.
  tab.saveTurns(views.map(({ turn }) => (turn === run?.view.turn && turn.answer === "" ? lost(run.before) : turn)));
}

/** A turn that was active when the page was closed has ended with it. */
const restored = (turn) => (isBusy(turn) ? lost({ ...turn, state: "broken", isKept: true }) : turn);

const lost = (turn) => ({ ...turn, notice: notice("connection_lost") });

// ---- setup --------------------------------------------------------------------------------------------------------

page.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
  focusInput();
});
page.input.addEventListener("input", onInput);
page.input.addEventListener("keydown", (event) => {
  // While an input method composes, Enter accepts its suggestion. Safari ends the composition first: check code 229 too.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
});
page.stop.addEventListener("click", (event) => {
  // The second click of a double click on Send must not stop the request.
  if (event.detail < 2) stop();
});
page["new-chat"].addEventListener("click", newChat);
page.language.addEventListener("click", () => {
  switchLanguage();
  showLanguage();
});
page["to-newest"].addEventListener("click", () => {
  isPinned = true;
  followEnd();
});
page.scroller.addEventListener("scroll", onScroll, { passive: true });
page["key-form"].addEventListener("submit", (event) => {
  event.preventDefault();
  onKeyGiven();
});
page["key-cancel"].addEventListener("click", () => page["key-dialog"].close());
new ResizeObserver(followEnd).observe(page.scroller);
document.addEventListener("visibilitychange", watchLoad);
window.addEventListener("pagehide", saveTurns);
setInterval(() => views.at(-1)?.tick(), 1000);

tab.claimConversation(() => {
  tab.renewConversation();
  showTurns([]);
  setInput("");
  saveTurns();
});
showTurns(tab.loadTurns().map(restored));
showLanguage();
setInput(tab.loadDraft());
showModel();
watchLoad();
focusInput();
