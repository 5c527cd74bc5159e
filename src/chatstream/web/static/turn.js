// Draws one turn: the message, and its answer: the position in the queue, the text, or the reason for an error.
// Sets text of users and models as text, never as markup. Makes no HTTP calls.

import { words } from "./i18n.js";

const MAX_DOTS = 12;

/**
 * @typedef {object} Turn  One message and its answer; plain data, which survives a reload.
 * @property {string} text
 * @property {string} answer
 * @property {"sending" | "waiting" | "answering" | "done" | "stopped" | "broken" | "unsent"} state
 * @property {boolean} isKept  The server's conversation contains it, possibly with a partial answer: a retry regenerates.
 * @property {number} [position]
 * @property {boolean} [isEstimate]  The position is an estimate: under the policy, a later request may start first.
 * @property {string} [waitsFor]  The server's code for the reason of the wait.
 * @property {{etaS: number, p90S: number | null, at: number} | null} [eta]  The estimate received at the time `at`, in ms.
 * @property {number | null} waitedS
 * @property {number | null} tokens
 * @property {string | null} finish
 * @property {Notice | null} notice
 *
 * @typedef {object} Notice  The reason for an incomplete answer.
 * @property {string} code
 * @property {string} message  The server's message, shown if the page has no text for the code.
 * @property {number | null} retryAt  The time of the server's Retry-After, in ms; null without one.
 * @property {boolean} isFinal  The same message would be refused again.
 */

/** @returns {boolean} whether a request for this turn is active */
export const isBusy = (turn) => turn.state === "sending" || turn.state === "waiting" || turn.state === "answering";

export class TurnView {
  /**
   * @param {Turn} turn
   * @param {{tryAgain(view: TurnView): void, edit(view: TurnView): void, copy(view: TurnView): Promise<void>}} actions
   */
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.element = make("section", "turn");
  }

  /** Draws everything again. Only the last turn can be retried. */
  draw(isLast) {
    const { turn } = this;
    this.answerText = null;
    this.live = null;
    this.element.replaceChildren(this.#question(), this.#answer(isLast));
    this.element.classList.toggle("not-sent", turn.state === "unsent");
    this.tick();
  }

  /** Appends the text received since the last call; the user's selection is kept. */
  showNewText() {
    if (!this.answerText) return;
    this.answerText.appendData(this.turn.answer.slice(this.answerText.length));
  }

  /** Updates the seconds. */
  tick() {
    if (this.live) this.live.textContent = isBusy(this.turn) ? waitText(this.turn) : retryText(this.turn.notice);
  }

  #question() {
    return make("article", "question", make("h2", "unseen", words().you), textElement(this.turn.text));
  }

  #answer(isLast) {
    const { turn } = this;
    const article = make("article", "answer", make("h2", "unseen", words().answer));
    if (turn.state === "sending") article.append(make("p", "pulse", words().sending));
    if (turn.state === "waiting") article.append(this.#queue());
    if (turn.state === "answering" && turn.answer === "") article.append(make("p", "pulse", words().thinking));
    if (turn.answer !== "" || turn.state === "answering") article.append(this.#text());
    if (turn.state === "done" && turn.answer === "") article.append(make("p", "meta", words().emptyAnswer));
    if (!isBusy(turn)) article.append(...this.#ending(isLast));
    return article;
  }

  #text() {
    const text = textElement(this.turn.answer);
    text.classList.toggle("growing", this.turn.state === "answering");
    this.answerText = text.firstChild;
    return text;
  }

  /** The card of a waiting request: the position as text and as dots, and the estimate. */
  #queue() {
    const { position, isEstimate } = this.turn;
    this.live = make("p", "wait");
    const dots = make("span", "dots");
    dots.setAttribute("aria-hidden", "true");
    for (let i = Math.max(1, position - MAX_DOTS + 1); i <= position; i++) dots.append(make("i", i === position ? "me" : ""));
    return make("div", "queue", make("p", "position", words().position(position, isEstimate)), dots, this.live);
  }

  #ending(isLast) {
    const { turn, actions } = this;
    const parts = [];
    const row = make("div", "row");
    const meta = metaText(turn);
    if (meta) row.append(make("p", "meta", meta));
    if (turn.answer !== "") row.append(this.#copyButton());
    if (isLast && turn.state !== "unsent" && (!turn.notice || turn.notice.isFinal)) row.append(button(words().regenerate, () => actions.tryAgain(this)));
    if (row.hasChildNodes()) parts.push(row);
    if (turn.notice) parts.push(this.#notice(isLast));
    return parts;
  }

  #notice(isLast) {
    const { turn, actions } = this;
    const notice = make("div", "notice", make("p", "", reasonText(turn.notice)));
    if (turn.notice.retryAt !== null && isLast) {
      this.live = make("p", "retry");
      notice.append(this.live);
    }
    if (isLast) {
      const row = make("div", "row");
      if (!turn.notice.isFinal) row.append(button(words().tryAgain, () => actions.tryAgain(this), "primary small"));
      if (turn.state === "unsent") row.append(button(words().edit, () => actions.edit(this)));
      notice.append(row);
    }
    return notice;
  }

  #copyButton() {
    const copy = button(words().copy, async () => {
      await this.actions.copy(this);
      copy.textContent = words().copied;
      setTimeout(() => (copy.textContent = words().copy), 2000);
    });
    return copy;
  }
}

/** The reason for an incomplete answer, in the user's language. */
export function reasonText({ code, message }) {
  return words().reason[code] ?? words().otherReason(message);
}

/** The time until a retry is useful; "" if the server sent none. */
export function retryText(notice) {
  if (!notice || notice.retryAt === null) return "";
  const seconds = Math.ceil((notice.retryAt - Date.now()) / 1000);
  return seconds > 0 ? words().tryAgainIn(seconds) : words().tryAgainNow;
}

/** @param {Turn} turn */
function waitText({ eta, waitsFor }) {
  if (Object.hasOwn(words().waitsFor, waitsFor)) return words().waitsFor[waitsFor];
  if (!eta) return words().waitUnknown;
  const passed = (Date.now() - eta.at) / 1000;
  return words().wait(Math.max(0, eta.etaS - passed), eta.p90S === null ? null : Math.max(0, eta.p90S - passed));
}

function metaText(turn) {
  const facts = [];
  if (turn.waitedS !== null) facts.push(words().waited(turn.waitedS));
  if (turn.tokens !== null) facts.push(words().tokens(turn.tokens));
  if (turn.state === "done" && turn.finish) facts.push(words().finish[turn.finish] ?? turn.finish);
  if (turn.state === "stopped") facts.push(words().stopped);
  return facts.join(" · ");
}

function textElement(text) {
  const element = make("div", "text", text);
  if (!element.firstChild) element.append(document.createTextNode(""));
  element.dir = "auto";
  return element;
}

function button(label, onClick, className = "quiet small") {
  const element = make("button", className, label);
  element.type = "button";
  element.addEventListener("click", onClick);
  return element;
}

/** An element with a class and children; strings become text nodes. */
function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}
