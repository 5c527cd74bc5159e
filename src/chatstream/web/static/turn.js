// Draws one turn: what was asked, and the answer with its place in line, its text, or why there is none.
// Text from people and models is only ever set as text, never as markup. Asks nothing of the server.

import { words } from "./i18n.js";

const MAX_DOTS = 12;

/**
 * @typedef {object} Turn  One question and its answer; plain data, saved over a reload.
 * @property {string} text
 * @property {string} answer
 * @property {"sending" | "waiting" | "answering" | "done" | "stopped" | "broken" | "unsent"} state
 * @property {boolean} isKept  The server has it in the conversation, if with part of an answer: trying again is to regenerate.
 * @property {number} [position]
 * @property {boolean} [isEstimate]  The position is one: the policy lets others come in front.
 * @property {string} [waitsFor]  Why it waits: a code of the server's.
 * @property {{etaS: number, p90S: number | null, at: number} | null} [eta]  As told at the time `at`, in ms.
 * @property {number | null} waitedS
 * @property {number | null} tokens
 * @property {string | null} finish
 * @property {Notice | null} notice
 *
 * @typedef {object} Notice  Why the last attempt gave no whole answer.
 * @property {string} code
 * @property {string} message  In the server's words, shown where the page has none for the code.
 * @property {number | null} retryAt  When it makes sense to try again, in ms; null where nobody said.
 * @property {boolean} isFinal  The same question would be refused again.
 */

/** @returns {boolean} whether a request for this turn is under way */
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

  /** Draws everything anew. Only the last turn offers to try again. */
  draw(isLast) {
    const { turn } = this;
    this.answerText = null;
    this.live = null;
    this.element.replaceChildren(this.#question(), this.#answer(isLast));
    this.element.classList.toggle("not-sent", turn.state === "unsent");
    this.tick();
  }

  /** Shows the text that came since the last call, without touching what the reader may have selected. */
  showNewText() {
    if (!this.answerText) return;
    this.answerText.appendData(this.turn.answer.slice(this.answerText.length));
  }

  /** Brings the seconds up to date. */
  tick() {
    if (this.live) this.live.textContent = isBusy(this.turn) ? waitText(this.turn) : retryText(this.turn.notice);
  }

  #question() {
    return make("article", "question", make("h2", "unseen", words().you), said(this.turn.text));
  }

  #answer(isLast) {
    const { turn } = this;
    const article = make("article", "answer", make("h2", "unseen", words().answer));
    if (turn.state === "sending") article.append(make("p", "pulse", words().sending));
    if (turn.state === "waiting") article.append(this.#line());
    if (turn.state === "answering" && turn.answer === "") article.append(make("p", "pulse", words().thinking));
    if (turn.answer !== "" || turn.state === "answering") article.append(this.#text());
    if (turn.state === "done" && turn.answer === "") article.append(make("p", "meta", words().emptyAnswer));
    if (!isBusy(turn)) article.append(...this.#ending(isLast));
    return article;
  }

  #text() {
    const text = said(this.turn.answer);
    text.classList.toggle("growing", this.turn.state === "answering");
    this.answerText = text.firstChild;
    return text;
  }

  /** The card of those who wait: the place in words and as dots, and the estimate. */
  #line() {
    const { position, isEstimate } = this.turn;
    this.live = make("p", "wait");
    const dots = make("span", "dots");
    dots.setAttribute("aria-hidden", "true");
    for (let i = Math.max(1, position - MAX_DOTS + 1); i <= position; i++) dots.append(make("i", i === position ? "me" : ""));
    return make("div", "line", make("p", "place", words().place(position, isEstimate)), dots, this.live);
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

/** Why there is no answer, in the reader's language. */
export function reasonText({ code, message }) {
  return words().reason[code] ?? words().otherReason(message);
}

/** When it makes sense to try again; "" where the server did not say. */
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

function said(text) {
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
