"""Answers of the bundled model, generated greedily by the real engine."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.demo import create_engine, load
from chatstream.types import FinishReason, GenerationRequest, Message, PromptInput, SamplingParams

pytestmark = pytest.mark.anyio

GREEDY = SamplingParams(temperature=0.0, seed=0)

# A question, and words that its answer must contain ("a|b": one of the two). Questions marked "held out" are not in the
# training data.
TOPICS = [
    ("What is ChatStream?", "queue", "limit"),
    ("What is a slot?", "slot", "answer"),
    ("could you say what slots are?", "slot", "answer"),  # held out
    ("What is the queue?", "wait", "slot"),
    ("how is the queue organised", "wait", "slot"),  # held out
    ("Why do I have to wait?", "slots are taken"),
    ("Why is there waiting at all?", "slots are taken"),  # held out
    ("What does my position mean?", "next to start"),
    ("What happens when I leave?", "given back"),
    ("Suppose I shut the browser, what happens?", "given back"),  # held out
    ("How do I cancel a request?", "DELETE"),
    ("What is max_concurrency?", "max_concurrency", "slots"),
    ("What is max_queue_size?", "max_queue_size", "429"),
    ("what should I do about a 429?", "queue_full", "Retry-After"),  # held out
    ("What is a token?", "piece of text"),
    ("is one token one letter", "piece of text"),  # held out
    ("What is streaming?", "generated"),
    ("Why one token each in turn?", "one token in each step"),
    ("Is it first come, first served?", "first come, first served"),  # held out
    ("How do I use my own model?", "chatstream serve NAME", 'pip install ".[transformers]"'),
    ("How do I install ChatStream?", "openchatstream", "pip install ."),
    ("Show me a FastAPI example", "app.include_router(chat_stream.router)"),
    ("Is it compatible with the OpenAI API?", "/v1/chat/completions"),
    ("How many parameters do you have?", "two million"),
    ("Are you a real model?", "real neural network"),
    ("Who wrote you?", "ChatStream developers"),
    ("Hello!", "Hello", "demo model"),
    ("Thanks a lot", "welcome"),
    ("How is the weather today?", "cannot know the weather"),
    ("Tell me a joke", "only one slot|position in line"),
    ("Count to ten", "nine, ten"),
    ("bye", "Goodbye"),
    ("What is the capital of Portugal?", "small demo model"),  # held out
    ("who was Nelson Mandela", "small demo model"),  # held out
    ("スロットとは何ですか？", "スロット", "生成"),
    ("スロットというのは何でしょうか", "スロット", "生成"),  # held out
    ("なぜ待つの？", "スロットが使われている"),
    ("待たなければならない理由を教えて", "スロットが使われている"),  # held out
    ("順番とは何ですか", "1番なら次に始まります"),
    ("離れるとどうなりますか？", "返されます"),
    ("429とは何ですか", "queue_full"),
    ("トークンとは何ですか？", "かけら"),
    ("ストリーミングって何？", "少しずつ"),
    ("自分のモデルを使うにはどうすればいいですか", "chatstream serve NAME"),
    ("パラメータは何個ですか", "200万"),
    ("誰が作ったの？", "開発者"),
    ("こんにちは", "こんにちは"),
    ("ありがとう", "どういたしまして"),
    ("今日の天気は？", "天気はわかりません"),
    ("ポルトガルの首都はどこですか", "小さなデモモデル"),  # held out
]


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[StepEngine]:
    engine = create_engine()
    await engine.start()
    yield engine
    await engine.stop()


async def ask(
    engine: StepEngine, prompt: PromptInput, sampling: SamplingParams = GREEDY
) -> tuple[str, FinishReason | None]:
    request = GenerationRequest(str(id(prompt)), await engine.prepare(prompt, sampling), sampling)
    text, reason = "", None
    async for delta in engine.stream(request):
        text += delta.text
        reason = delta.finish_reason
    return text, reason


def has_one_of(text: str, words: str) -> bool:
    return any(word in text for word in words.split("|"))


def conversation(*texts: str) -> tuple[Message, ...]:
    return tuple(Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(texts))


async def test_every_topic_is_answered(engine: StepEngine) -> None:
    answers = await asyncio.gather(*(ask(engine, conversation(question)) for question, *_ in TOPICS))
    wrong = [
        (question, text)
        for (question, *words), (text, reason) in zip(TOPICS, answers, strict=True)
        if reason is not FinishReason.STOP or not all(has_one_of(text, word) for word in words)
    ]
    assert not wrong


async def test_a_detailed_answer_streams_at_least_100_tokens(engine: StepEngine) -> None:
    for question in ("Explain ChatStream in detail", "Tell me a story about a queue", "ChatStreamを詳しく説明して"):
        prompt = conversation(question)
        deltas = [d async for d in engine.stream(GenerationRequest("r", await engine.prepare(prompt, GREEDY), GREEDY))]
        assert len(deltas) >= 100
        assert deltas[-1].finish_reason is FinishReason.STOP


async def test_each_turn_of_a_long_conversation_gets_its_own_answer(engine: StepEngine) -> None:
    """Each answer fits its question and the question's language, whatever the turns before."""
    history: tuple[str, ...] = ()
    for question, word in [
        ("Hi!", "demo model"),
        ("What is a slot?", "slot"),
        ("Tell me more", "max_concurrency"),
        ("スロットとは何ですか？", "生成"),
        ("What is the capital of France?", "small demo model"),
        ("Tell me a story", "bakery"),
        ("トークンとは何ですか？", "かけら"),
        ("How do I use my own model?", "chatstream serve NAME"),
        ("thank you", "welcome"),
    ]:
        answer, _ = await ask(engine, conversation(*history, question))
        assert word in answer, (question, answer)
        history += (question, answer)


async def test_a_system_message_does_not_change_the_topic(engine: StepEngine) -> None:
    prompt = (Message("system", "You are a helpful assistant."), Message("user", "What is a slot?"))
    assert "slot" in (await ask(engine, prompt))[0]


async def test_default_sampling_gives_correct_answers(engine: StepEngine) -> None:
    defaults = load().default_sampling
    assert 0 < defaults.temperature <= 1
    for seed in range(8):
        sampling = SamplingParams(temperature=defaults.temperature, top_p=defaults.top_p, seed=seed)
        assert "next to start" in (await ask(engine, conversation("What does my position mean?"), sampling))[0]


async def test_the_engine_reports_its_name_and_context_length(engine: StepEngine) -> None:
    assert engine.model_name == "chatstream-demo"
    assert engine.capacity.context_len == 1024
