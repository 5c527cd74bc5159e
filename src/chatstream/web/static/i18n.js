// All texts of the page, in English and Japanese, and the choice of the language.

const ORDINAL = new Intl.PluralRules("en", { type: "ordinal" });
const SUFFIX = { one: "st", two: "nd", few: "rd", other: "th" };
const nth = (n) => `${n}${SUFFIX[ORDINAL.select(n)]}`;
const plural = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

/** 8 → "8 s", 95 → "2 min". */
const roughly = (seconds, s, min) => (seconds < 90 ? `${Math.max(1, Math.round(seconds))}${s}` : `${Math.round(seconds / 60)}${min}`);

const WORDS = {
  en: {
    title: "ChatStream",
    titleWaiting: (position, isEstimate) =>
      position === 1
        ? `${isEstimate ? "Probably next" : "Next"} in the queue · ChatStream`
        : `${isEstimate ? "About " : ""}${nth(position)} in the queue · ChatStream`,
    titleAnswering: "Answering · ChatStream",
    otherLanguage: "日本語",
    newChat: "New chat",
    conversation: "Conversation",
    composer: "Your message",
    placeholder: "Ask something",
    send: "Send",
    stop: "Stop",
    leave: "Leave the queue",
    keys: "Enter sends, Shift + Enter starts a new line.",
    toNewest: "Jump to latest",
    you: "You",
    answer: "Answer",
    welcome: "What would you like to know?",
    welcomeText: "Your request starts as soon as a slot is free. Until then you see your position in the queue.",
    demoTitle: "This is a toy model",
    demoText:
      "It has about 2 million parameters and ships with ChatStream so that you can try the queue. It can answer questions about ChatStream and make small talk, but little else. Run your own model with",
    examples: ["What is ChatStream?", "How does the queue work?", "Tell me a story"],
    hint: "It answers too fast for a queue to form. To see the queue, start the server with --engine mock --mock-type long and open this page in three windows.",
    load: ({ processing, max_processing, waiting }) => `${processing} of ${max_processing} generating, ${waiting} waiting`,
    modelLabel: "Model",
    sending: "Sending",
    position: (position, isEstimate) =>
      position === 1
        ? `You are ${isEstimate ? "probably " : ""}next in the queue`
        : `You are ${isEstimate ? "about " : ""}${nth(position)} in the queue`,
    wait: (etaS, p90S) =>
      etaS < 1
        ? "Starts any moment now"
        : p90S !== null && p90S > etaS * 1.3
          ? `Starts in about ${roughly(etaS, " s", " min")}, most likely within ${roughly(p90S, " s", " min")}`
          : `Starts in about ${roughly(etaS, " s", " min")}`,
    waitUnknown: "No estimate yet",
    waitsFor: {
      conversation: "Starts when your earlier message has been answered",
      client_limit: "Starts when one of your other requests has ended",
      opening: "Starts when the server is ready",
    },
    thinking: "Reading your message",
    answering: "The answer starts",
    answered: "The answer is complete",
    waited: (seconds) => (seconds < 0.1 ? "no wait" : `waited ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`),
    tokens: (n) => plural(n, "token", "tokens"),
    finish: { stop: "complete", length: "cut at the length limit" },
    emptyAnswer: "The model returned an empty answer.",
    copy: "Copy",
    copied: "Copied",
    regenerate: "Regenerate",
    tryAgain: "Try again",
    edit: "Edit",
    stopped: "stopped by you",
    tryAgainIn: (seconds) => `Try again in ${seconds} s.`,
    tryAgainNow: "You can try again now.",
    reason: {
      left: "You left the queue.",
      stopped_early: "You stopped the request before the answer started.",
      queue_full: "The queue is full.",
      client_limit: "You already have the maximum number of requests.",
      rate_limited: "Too many requests in a short time.",
      queue_timeout: "The request did not start within this server's time limit.",
      infeasible: "The queue is too long: the request would not start in time.",
      shutting_down: "The server is shutting down.",
      engine_unavailable: "The model is not available.",
      paused: "The server does not accept new requests at the moment.",
      cancelled: "This request was cancelled on the server.",
      engine_error: "The model failed on this request.",
      prompt_too_long: "This is too long for the model. Shorten it, or start a new chat.",
      body_too_large: "This message is too large for the server.",
      unauthorized: "This server requires an API key.",
      forbidden: "This server does not allow that.",
      unreachable: "The server cannot be reached.",
      connection_lost: "The connection was lost before the answer was complete.",
    },
    otherReason: (message) => `The server refused: ${message}`,
    keyTitle: "API key",
    keyText: "This server requires an API key. It is kept in this tab only, until you close it.",
    keyWrong: "The server did not accept this key.",
    keyLabel: "Key",
    keySave: "Continue",
    keyCancel: "Cancel",
  },
  ja: {
    title: "ChatStream",
    titleWaiting: (position, isEstimate) =>
      position === 1
        ? `${isEstimate ? "おそらく" : ""}次があなたの番です · ChatStream`
        : `${isEstimate ? "およそ" : ""}${position}番目 · ChatStream`,
    titleAnswering: "回答中 · ChatStream",
    otherLanguage: "English",
    newChat: "新規チャット",
    conversation: "会話",
    composer: "メッセージ",
    placeholder: "メッセージを入力",
    send: "送信",
    stop: "停止",
    leave: "キューから抜ける",
    keys: "Enter で送信、Shift + Enter で改行します。",
    toNewest: "最新へ移動",
    you: "あなた",
    answer: "回答",
    welcome: "何を知りたいですか？",
    welcomeText: "順番が来るとすぐに回答が始まります。それまではキューの何番目かが表示されます。",
    demoTitle: "これは小さなお試しモデルです",
    demoText:
      "順番待ちを試せるように ChatStream に同梱された、約200万パラメーターのモデルです。ChatStream に関する質問と簡単な雑談以外には、ほとんど答えられません。お好きなモデルは次のコマンドで動かせます：",
    examples: ["ChatStreamとは何ですか", "順番待ちはどういう仕組みですか", "物語を聞かせて"],
    hint: "応答が速いため、順番待ちはほとんど発生しません。順番待ちの様子を見るには、サーバーを --engine mock --mock-type long で起動し、このページを3つのウィンドウで開いてください。",
    load: ({ processing, max_processing, waiting }) => `生成中 ${processing} / ${max_processing}、待ち ${waiting}`,
    modelLabel: "モデル",
    sending: "送信中",
    position: (position, isEstimate) =>
      position === 1
        ? `${isEstimate ? "おそらく" : ""}次があなたの番です`
        : `${isEstimate ? "およそ" : ""}${position}番目に並んでいます`,
    wait: (etaS, p90S) =>
      etaS < 1
        ? "まもなく始まります"
        : p90S !== null && p90S > etaS * 1.3
          ? `約${roughly(etaS, "秒", "分")}後に始まります（長くて${roughly(p90S, "秒", "分")}ほど）`
          : `約${roughly(etaS, "秒", "分")}後に始まります`,
    waitUnknown: "待ち時間はまだ見積もれません",
    waitsFor: {
      conversation: "前のメッセージへの回答が終わると始まります",
      client_limit: "実行中のほかのリクエストが終わると始まります",
      opening: "サーバーの準備ができると始まります",
    },
    thinking: "メッセージを読んでいます",
    answering: "回答が始まりました",
    answered: "回答が完了しました",
    waited: (seconds) => (seconds < 0.1 ? "待ち時間なし" : `待ち時間 ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)}秒`),
    tokens: (n) => `${n.toLocaleString("ja")}トークン`,
    finish: { stop: "完了", length: "長さの上限で終了" },
    emptyAnswer: "モデルの回答は空でした。",
    copy: "コピー",
    copied: "コピーしました",
    regenerate: "再生成",
    tryAgain: "もう一度試す",
    edit: "編集",
    stopped: "途中で停止",
    tryAgainIn: (seconds) => `${seconds}秒後にもう一度お試しください。`,
    tryAgainNow: "もう一度お試しいただけます。",
    reason: {
      left: "キューから抜けました。",
      stopped_early: "回答が始まる前に停止しました。",
      queue_full: "キューがいっぱいです。",
      client_limit: "同時に送信できるリクエスト数の上限に達しています。",
      rate_limited: "短時間に送信されたリクエストが多すぎます。",
      queue_timeout: "待ち時間の上限までに順番が来ませんでした。",
      infeasible: "キューが長く、待ち時間の上限までに始まらない見込みです。",
      shutting_down: "サーバーは終了処理中です。",
      engine_unavailable: "モデルが利用できません。",
      paused: "サーバーは現在、新しいリクエストを受け付けていません。",
      cancelled: "このリクエストはサーバー側でキャンセルされました。",
      engine_error: "モデルでエラーが発生しました。",
      prompt_too_long: "モデルには長すぎます。短くするか、新しいチャットを始めてください。",
      body_too_large: "メッセージがサーバーの上限を超えています。",
      unauthorized: "このサーバーには API キーが必要です。",
      forbidden: "この操作は許可されていません。",
      unreachable: "サーバーに接続できません。",
      connection_lost: "回答の途中で接続が切れました。",
    },
    otherReason: (message) => `サーバーがリクエストを拒否しました：${message}`,
    keyTitle: "API キー",
    keyText: "このサーバーには API キーが必要です。キーはこのタブを閉じるまで、このタブだけに保存されます。",
    keyWrong: "このキーは受け付けられませんでした。",
    keyLabel: "キー",
    keySave: "続ける",
    keyCancel: "キャンセル",
  },
};

const STORED_AS = "chatstream.language";

/** @type {"en" | "ja"} */
export let language = stored() ?? preferred(navigator.languages);

/** The texts in the current language. */
export function words() {
  return WORDS[language];
}

/** Switches to the other language, for this browser. */
export function switchLanguage() {
  language = language === "en" ? "ja" : "en";
  try {
    localStorage.setItem(STORED_AS, language);
  } catch {
    // Storage is not permitted: the choice holds until the page is closed.
  }
}

/** Sets the texts of all elements with `data-text` (text), `data-label` (ARIA label) or `data-hint` (placeholder). */
export function translate(root) {
  document.documentElement.lang = language;
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = words()[element.dataset.text];
  for (const element of root.querySelectorAll("[data-label]")) element.setAttribute("aria-label", words()[element.dataset.label]);
  for (const element of root.querySelectorAll("[data-hint]")) element.placeholder = words()[element.dataset.hint];
}

/** The first of the user's languages that this page has; English if none. */
function preferred(languages) {
  for (const tag of languages) {
    const primary = tag.toLowerCase().split("-")[0];
    if (Object.hasOwn(WORDS, primary)) return primary;
  }
  return "en";
}

function stored() {
  try {
    const name = localStorage.getItem(STORED_AS);
    return name !== null && Object.hasOwn(WORDS, name) ? name : null;
  } catch {
    return null;
  }
}
