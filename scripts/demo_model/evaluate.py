"""Evaluates a trained demo model: the share of answers that the question's intent allows.

    python scripts/demo_model/evaluate.py [--checkpoint DIR] [--show]

The questions of the exam were written after the training data and never used to change it. Held-out questions are
phrasings excluded from training, but known while the data was written. Fresh questions are new draws from the training
patterns. An answer counts only if it is one of the intent's answers, word for word. Runs the model in the real engine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dialogues import LANGUAGES, Corpus, Intent

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.demo import CHECKPOINT, MODEL_NAME, load
from chatstream.types import GenerationRequest, Message, SamplingParams

CONCURRENCY = 16
SEED = 99


@dataclass(frozen=True)
class Question:
    messages: tuple[Message, ...]
    right_answers: Collection[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--show", action="store_true", help="print every question with a wrong answer")
    options = parser.parse_args()
    asyncio.run(examine(options.checkpoint, options.show))


async def examine(checkpoint: Path, is_verbose: bool) -> None:
    engine = StepEngine(MODEL_NAME, lambda: load(checkpoint))
    await engine.start()
    corpus, rng = Corpus(), random.Random(SEED)
    greedy = SamplingParams(temperature=0.0, max_new_tokens=400, seed=SEED)
    warm = engine.default_sampling
    for name, questions in {
        **{f"exam, {language}": single(corpus.exam(), language) for language in LANGUAGES},
        **{f"held out, {language}": single(corpus.held_out(), language) for language in LANGUAGES},
        **{f"fresh, {language}": fresh(corpus, language, 300, rng) for language in LANGUAGES},
        "turn 4 of a chat": later_turns(corpus, 4, 150, rng),
        "turn 12 of a chat": later_turns(corpus, 12, 50, rng),
    }.items():
        for sampling in (greedy, warm):
            answers = await answer_all(engine, questions, sampling)
            wrong = [(q, a) for q, a in zip(questions, answers, strict=True) if a not in q.right_answers]
            share = 1 - len(wrong) / len(questions)
            print(f"{name:18} temperature {sampling.temperature:.1f}  {share:6.1%} of {len(questions)}", flush=True)
            if is_verbose and sampling is greedy:
                for question, answer in wrong:
                    print(f"    {question.messages[-1].content!r} -> {answer[:100]!r}")
    await engine.stop()


def single(questions: Iterable[tuple[str, Intent, str]], language: str) -> list[Question]:
    return [Question((Message("user", text),), intent.answers) for lang, intent, text in questions if lang == language]


def fresh(corpus: Corpus, language: str, number: int, rng: random.Random) -> list[Question]:
    intents = list(corpus.intents[language].values())
    drawn = [rng.choice(intents) for _ in range(number)]
    return [Question((Message("user", corpus.question(i, language, rng)),), i.answers) for i in drawn]


def later_turns(corpus: Corpus, num_turns: int, number: int, rng: random.Random) -> list[Question]:
    """The last question of each conversation; the earlier turns have correct answers."""
    questions = []
    for _ in range(number):
        dialogue = corpus.dialogue(num_turns, rng)
        messages = [
            message
            for turn in dialogue.turns
            for message in (Message("user", turn.question), Message("assistant", turn.answer))
        ]
        last = messages.pop().content
        # The dialogue contains one answer; every other answer of its intent is correct too.
        families = [i.answers for intents in corpus.intents.values() for i in intents.values() if last in i.answers]
        questions.append(Question(tuple(messages), {last}.union(*families)))
    return questions


async def answer_all(engine: StepEngine, questions: Sequence[Question], sampling: SamplingParams) -> list[str]:
    slots = asyncio.Semaphore(CONCURRENCY)

    async def answer(number: int) -> str:
        async with slots:
            prompt = await engine.prepare(questions[number].messages, sampling, may_drop_history=True)
            request = GenerationRequest(str(number), prompt, sampling)
            return "".join([delta.text async for delta in engine.stream(request)])

    return await asyncio.gather(*(answer(number) for number in range(len(questions))))


if __name__ == "__main__":
    main()
