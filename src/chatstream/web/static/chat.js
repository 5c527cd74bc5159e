// The chat page: one conversation, at most one request under way, and what the reader can do about it.
// Words are in i18n.js, drawing in turn.js, calls in api.js, memory in tab.js.

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
 * @typedef {object} Run  A request under way.
 * @property {TurnView} view
 * @property {import("./turn.js").Turn} before  The turn as it stood before this attempt.
 * @property {AbortController} abort
 * @property {string | null} requestId
 * @property {boolean} started
 * @property {boolean} stopped  By the reader.
 */
/** @type {Run | null} */
let run = null;
let load = null;
/** Whether the view follows the end of the conversation: until the reader scrolls up, and again once back at the end. */
let isPinned = true;
let lastScrollTop = 0;

// ---- asking -------------------------------------------------------------------------------------------------------

function send() {
  const text = page.input.value.trim();
  if (text === "" || run) return;
  setInput("");
  say(text);
}

function say(text) {
  const previous = views.at(-1);
  // Why an old answer was not replaced is of no interest any more; why a message was not sent is.
  if (previous?.turn.state === "done") previous.turn.notice = null;
  const view = addView({ text, ...UNANSWERED, state: "unsent", isKept: false });
  previous?.draw(false);
  answer(view);
}

/** Asks for the answer of the last turn, first or again, and sees it through to its end, whichever it is. */
async function answer(view) {
  const { turn } = view;
  const mine = { view, before: { ...turn }, abort: new AbortController(), requestId: null, started: false, stopped: false };
  run = mine;
  Object.assign(turn, UNANSWERED, { state: "sending" });
  isPinned = true;
  showState();
  keepFocus();
  try {
    await converse(mine);
    turn.isKept ||= turn.answer !== "";
  } catch (error) {
    settle(mine, error);
    announce(turn.notice ? `${reasonText(turn.notice)} ${retryText(turn.notice)}`.trim() : words().stopped);
  } finally {
    // A new chat may have begun meanwhile.
    if (run === mine) run = null;
    showState();
    saveTurns();
    keepFocus();
    watchLoad();
  }
}

/** Ends an attempt that brought no whole answer. */
function settle(mine, error) {
  const { turn } = mine.view;
  turn.notice = noticeOf(mine, error);
  if (turn.answer !== "") {
    turn.state = mine.stopped ? "stopped" : "broken";
    // The server keeps what it had said to somebody who left or was sent away, but nothing of what its model failed at.
    turn.isKept ||= !(error instanceof api.Refusal) || error.code === "cancelled";
  } else {
    // What stood there before stands again: a regeneration that brought nothing costs no answer.
    Object.assign(turn, mine.before, { notice: turn.notice });
  }
}

/** Runs the request to its end, asking for an API key or repeating the whole question where that is what it takes. */
async function converse(mine) {
  const { turn } = mine.view;
  let question = turn.isKept ? { user_input: null, regenerate: true } : { user_input: turn.text, regenerate: false };
  for (;;) {
    try {
      for await (const event of api.ask(question, mine.abort.signal)) onEvent(mine, event);
      return;
    } catch (error) {
      const isRefusal = error instanceof api.Refusal && !mine.started;
      if (isRefusal && question.regenerate && error.code === "invalid_request") {
        // The server has forgotten the conversation: it was restarted, or the session ended.
        question = { user_input: turn.text, regenerate: false };
      } else if (!(isRefusal && isAboutKey(error) && (await askForKey()))) {
        throw error;
      }
    }
  }
}

function onEvent(mine, event) {
  const { view } = mine;
  const { turn } = view;
  mine.requestId = event.request_id ?? mine.requestId;
  switch (event.type) {
    case "queued":
      turn.waitsFor = event.waits_for;
      turn.eta = event.eta_seconds === null ? null : { etaS: event.eta_seconds, p90S: event.eta_p90_seconds, at: Date.now() };
      announcePlace(turn, event.position, event.position_kind === "estimate");
      break;
    case "started":
      mine.started = true;
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

function announcePlace(turn, position, isEstimate) {
  const isNews = turn.state !== "waiting" || turn.position !== position || turn.isEstimate !== isEstimate;
  if (isNews) announce(words().place(position, isEstimate));
  Object.assign(turn, { state: "waiting", position, isEstimate });
}

/** Text is drawn once a frame, however fast it comes; in a hidden tab there are no frames and it waits in `turn`. */
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

/** Why an attempt gave no whole answer; null where the reader stopped it and knows. */
function noticeOf(mine, error) {
  if (mine.stopped) return mine.view.turn.answer === "" ? notice(mine.started ? "stopped_early" : "left") : null;
  if (error instanceof api.Refusal) {
    const retryAt = error.retryAfterS === null ? null : Date.now() + error.retryAfterS * 1000;
    return { ...notice(error.code, error.message), retryAt, isFinal: error.status === 400 || error.status === 413 };
  }
  if (!(error instanceof api.ConnectionLost)) console.error(error);
  return notice(mine.requestId ? "connection_lost" : "unreachable");
}

const notice = (code, message = "") => ({ code, message, retryAt: null, isFinal: false });

/** Leaves the line or stops the answer. */
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

/** Puts the words of a message that was not sent back where they can be changed. */
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
    // Forbidden, or absent: the clipboard's interface exists only on https and localhost.
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

// ---- showing ------------------------------------------------------------------------------------------------------

/** Brings everything but the older turns in line with the state. */
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
  // Any move upwards lets go, however small: a slow finger on a trackpad must win against the next token.
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

/** A button that was pressed may be gone with what it stood in; the keyboard's user goes on at the input. */
function keepFocus() {
  if (document.activeElement === document.body) focusInput();
}

/** Not on a touch screen, where the keyboard would come up and cover the answer. */
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
      example.addEventListener("click", () => !run && say(text));
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

/** Asks every few seconds, while somebody looks and until it fails once; called again when there is a reason to hope. */
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

// ---- memory -------------------------------------------------------------------------------------------------------

function saveTurns() {
  // An attempt that has brought nothing yet leaves the turn as it was, should the page go away now.
  tab.saveTurns(views.map(({ turn }) => (turn === run?.view.turn && turn.answer === "" ? lost(run.before) : turn)));
}

/** A turn that was under way when the page went away was ended with it. */
const restored = (turn) => (isBusy(turn) ? lost({ ...turn, state: "broken", isKept: true }) : turn);

const lost = (turn) => ({ ...turn, notice: notice("connection_lost") });

// ---- wiring -------------------------------------------------------------------------------------------------------

page.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
  focusInput();
});
page.input.addEventListener("input", onInput);
page.input.addEventListener("keydown", (event) => {
  // While an input method composes, Enter accepts its suggestion. Safari ends the composition first: there only 229 tells.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
});
page.stop.addEventListener("click", (event) => {
  // The second half of a double click on Send must not undo it.
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
