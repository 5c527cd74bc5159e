// Every word the page says, in English and Japanese. Chooses the language; knows nothing of the chat.

const ORDINAL = new Intl.PluralRules("en", { type: "ordinal" });
const SUFFIX = { one: "st", two: "nd", few: "rd", other: "th" };
const nth = (n) => `${n}${SUFFIX[ORDINAL.select(n)]}`;
const plural = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

/** 8 → "8 s", 95 → "2 min": nobody waits to the second. */
const roughly = (seconds, s, min) => (seconds < 90 ? `${Math.max(1, Math.round(seconds))}${s}` : `${Math.round(seconds / 60)}${min}`);

const WORDS = {
  en: {
    title: "ChatStream",
    titleWaiting: (position, isEstimate) =>
      position === 1
        ? `${isEstimate ? "Probably next" : "Next"} in line · ChatStream`
        : `${isEstimate ? "About " : ""}${nth(position)} in line · ChatStream`,
    titleAnswering: "Answering · ChatStream",
    otherLanguage: "日本語",
    newChat: "New chat",
    conversation: "Conversation",
    composer: "Your message",
    placeholder: "Ask something",
    send: "Send",
    stop: "Stop",
    leave: "Leave the line",
    keys: "Enter sends, Shift + Enter begins a new line.",
    toNewest: "To the newest",
    you: "You",
    answer: "Answer",
    welcome: "What would you like to know?",
    welcomeText: "You get an answer as soon as it is your turn, and see your place in line until then.",
    demoTitle: "This is a toy model",
    demoText:
      "It has about 2 million parameters and ships with ChatStream so that you can try the line. It knows ChatStream and small talk, little else. Run your own with",
    examples: ["What is ChatStream?", "How does the queue work?", "Tell me a story"],
    hint: "It answers too fast for a line to form. To watch one, start the server with --engine mock --mock-type long and open this page in three windows.",
    load: ({ processing, max_processing, waiting }) => `${processing} of ${max_processing} generating, ${waiting} waiting`,
    modelLabel: "Model",
    sending: "Sending",
    place: (position, isEstimate) =>
      position === 1
        ? `You are ${isEstimate ? "probably " : ""}next`
        : `You are ${isEstimate ? "about " : ""}${nth(position)} in line`,
    wait: (etaS, p90S) =>
      etaS < 1
        ? "It is your turn any moment now"
        : p90S !== null && p90S > etaS * 1.3
          ? `Your turn in about ${roughly(etaS, " s", " min")}, most likely within ${roughly(p90S, " s", " min")}`
          : `Your turn in about ${roughly(etaS, " s", " min")}`,
    waitUnknown: "No estimate yet",
    waitsFor: {
      conversation: "It starts when your earlier message has been answered",
      client_limit: "It starts when one of your other requests has ended",
      opening: "It starts when the server is ready",
    },
    thinking: "Reading your message",
    answering: "The answer begins",
    answered: "The answer is complete",
    waited: (seconds) => (seconds < 0.1 ? "no wait" : `waited ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`),
    tokens: (n) => plural(n, "token", "tokens"),
    finish: { stop: "complete", length: "cut at the length limit" },
    emptyAnswer: "The model answered with nothing.",
    copy: "Copy",
    copied: "Copied",
    regenerate: "Regenerate",
    tryAgain: "Try again",
    edit: "Edit",
    stopped: "stopped by you",
    tryAgainIn: (seconds) => `Try again in ${seconds} s.`,
    tryAgainNow: "You can try again now.",
    reason: {
      left: "You left the line.",
      stopped_early: "You stopped before the answer began.",
      queue_full: "The line is full.",
      client_limit: "You already have as many requests here as one visitor may have.",
      rate_limited: "That was too fast.",
      queue_timeout: "You waited as long as this server lets anybody wait, and it was not your turn.",
      infeasible: "The line is too long for the time you would wait.",
      shutting_down: "The server is shutting down.",
      engine_unavailable: "The model is not available.",
      paused: "The server is taking a break.",
      cancelled: "This request was ended on the server.",
      engine_error: "The model failed on this request.",
      prompt_too_long: "This is too long for the model. Shorten it, or begin a new chat.",
      body_too_large: "This message is too large for the server.",
      unauthorized: "This server asks for an API key.",
      forbidden: "This server does not let you do that.",
      unreachable: "The server cannot be reached.",
      connection_lost: "The connection was lost before the answer was complete.",
    },
    otherReason: (message) => `The server refused: ${message}`,
    keyTitle: "API key",
    keyText: "This server asks for an API key. It is kept in this tab only, until you close it.",
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
    leave: "列から抜ける",
    keys: "Enter で送信、Shift + Enter で改行します。",
    toNewest: "最新へ",
    you: "あなた",
    answer: "回答",
    welcome: "何を知りたいですか？",
    welcomeText: "順番が来るとすぐに回答が始まります。それまでは何番目かが表示されます。",
    demoTitle: "これは小さなお試しモデルです",
    demoText:
      "順番待ちを試せるように ChatStream に同梱された、約200万パラメーターのモデルです。ChatStream のことと簡単な雑談のほかは、ほとんど知りません。お好きなモデルは次のコマンドで動かせます：",
    examples: ["ChatStreamとは何ですか", "順番待ちはどういう仕組みですか", "物語を聞かせて"],
    hint: "答えるのが速すぎて、行列はまずできません。行列を見るには、サーバーを --engine mock --mock-type long で起動し、このページを3つのウィンドウで開いてください。",
    load: ({ processing, max_processing, waiting }) => `生成中 ${processing} / ${max_processing}、待ち ${waiting}`,
    modelLabel: "モデル",
    sending: "送信中",
    place: (position, isEstimate) =>
      position === 1
        ? `${isEstimate ? "おそらく" : ""}次があなたの番です`
        : `${isEstimate ? "およそ" : ""}${position}番目に並んでいます`,
    wait: (etaS, p90S) =>
      etaS < 1
        ? "まもなくです"
        : p90S !== null && p90S > etaS * 1.3
          ? `順番まで約${roughly(etaS, "秒", "分")}（長くて${roughly(p90S, "秒", "分")}ほど）`
          : `順番まで約${roughly(etaS, "秒", "分")}`,
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
      left: "列から抜けました。",
      stopped_early: "回答が始まる前に停止しました。",
      queue_full: "順番待ちの列がいっぱいです。",
      client_limit: "お一人で同時に送れる数の上限に達しています。",
      rate_limited: "送信の間隔が短すぎます。",
      queue_timeout: "待てる時間の上限まで待ちましたが、順番が来ませんでした。",
      infeasible: "列が長く、待てる時間のうちに順番が来そうにありません。",
      shutting_down: "サーバーは終了処理中です。",
      engine_unavailable: "モデルが利用できません。",
      paused: "サーバーは受付を休止しています。",
      cancelled: "このリクエストはサーバー側で終了されました。",
      engine_error: "モデルでエラーが起きました。",
      prompt_too_long: "モデルには長すぎます。短くするか、新しいチャットを始めてください。",
      body_too_large: "メッセージがサーバーの上限を超えています。",
      unauthorized: "このサーバーには API キーが必要です。",
      forbidden: "このサーバーでは許可されていません。",
      unreachable: "サーバーに接続できません。",
      connection_lost: "回答の途中で接続が切れました。",
    },
    otherReason: (message) => `サーバーに断られました：${message}`,
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

/** The words of the language in use. */
export function words() {
  return WORDS[language];
}

/** Switches between the two languages, for this browser. */
export function switchLanguage() {
  language = language === "en" ? "ja" : "en";
  try {
    localStorage.setItem(STORED_AS, language);
  } catch {
    // Storage is forbidden: the choice holds until the page is closed.
  }
}

/** Puts the words of the language in use into the elements that name one: `data-say` the text, `data-label` the label. */
export function translate(root) {
  document.documentElement.lang = language;
  for (const element of root.querySelectorAll("[data-say]")) element.textContent = words()[element.dataset.say];
  for (const element of root.querySelectorAll("[data-label]")) element.setAttribute("aria-label", words()[element.dataset.label]);
  for (const element of root.querySelectorAll("[data-hint]")) element.placeholder = words()[element.dataset.hint];
}

/** The first of the reader's languages that this page speaks; English if none. */
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
