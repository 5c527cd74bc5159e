"""Dialogues for the demo model, for training and evaluation.

`intents_en.toml` and `intents_ja.toml` contain the knowledge; this file draws conversations from them. It knows nothing
about tokens or training. All randomness comes from the `random.Random` argument.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LANGUAGES = ("en", "ja")


@dataclass(frozen=True)
class Intent:
    """One topic of questions, in one language."""

    name: str
    questions: tuple[str, ...]
    """Question patterns, see `Grammar`."""
    held_out: tuple[str, ...]
    """Phrasings excluded from training."""
    answers: tuple[str, ...]
    more: str | None


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    turns: tuple[Turn, ...]
    system: str | None = None


class Grammar:
    """Patterns of questions: `(a|b)` is a choice, `x?` an optional x, `<name>` one of a list of words, `\\+` a plus."""

    def __init__(self, words: Mapping[str, list[str]]) -> None:
        self._words = words

    def sample(self, pattern: str, rng: random.Random) -> str:
        text, end = self._sequence(pattern, 0, rng)
        if end != len(pattern):
            raise ValueError(f"unbalanced pattern: {pattern}")
        return re.sub(r" +", " ", text).strip()

    def _sequence(self, pattern: str, position: int, rng: random.Random) -> tuple[str, int]:
        parts: list[str] = []
        while position < len(pattern) and pattern[position] not in "|)":
            atom, position = self._atom(pattern, position, rng)
            if position < len(pattern) and pattern[position] == "?":
                position += 1
                atom = rng.choice((atom, ""))
            parts.append(atom)
        return "".join(parts), position

    def _atom(self, pattern: str, position: int, rng: random.Random) -> tuple[str, int]:
        match pattern[position]:
            case "(":
                choices: list[str] = []
                while pattern[position] != ")":
                    choice, position = self._sequence(pattern, position + 1, rng)
                    choices.append(choice)
                return rng.choice(choices), position + 1
            case "<":
                end = pattern.index(">", position)
                return rng.choice(self._words[pattern[position + 1 : end]]), end + 1
            case "\\":
                return pattern[position + 1], position + 2
            case character:
                return character, position + 1


# Intents that form a whole message: "ok, thanks" takes no opener.
SHORT_TALK = frozenset({"greeting", "how_are_you", "thanks", "bye", "ok", "test", "user_name", "compliment", "insult"})


@dataclass(frozen=True)
class Phrases:
    """Phrases around questions in one language, and messages that refer to the answer before."""

    openers: tuple[str, ...]
    endings: tuple[str, ...]
    short_endings: tuple[str, ...]
    system: tuple[str, ...]
    more: tuple[str, ...]
    no_more_answer: str
    repeat: tuple[str, ...]
    switch: tuple[str, ...]
    """Requests to answer in this language."""


class Corpus:
    """All intents of both languages, and conversations drawn from them."""

    def __init__(self) -> None:
        self.intents: dict[str, dict[str, Intent]] = {}
        self._grammars: dict[str, Grammar] = {}
        self._phrases: dict[str, Phrases] = {}
        for language in LANGUAGES:
            table = tomllib.loads((HERE / f"intents_{language}.toml").read_text(encoding="utf-8"))
            self._grammars[language] = Grammar(table.pop("words"))
            self._phrases[language] = Phrases(**table.pop("phrases"))
            self.intents[language] = {name: _intent(name, fields) for name, fields in table.items()}
        self._held_out = {
            _plain(question) for questions in (self.held_out(), self.exam()) for _, _, question in questions
        }
        # All intents have equal weight, except the fallback, which covers many topics.
        self._weights = {name: 9.0 if name == "fallback" else 1.0 for name in self.intents["en"]}

    def grammar(self, language: str) -> Grammar:
        return self._grammars[language]

    def question(self, intent: Intent, language: str, rng: random.Random, *, is_typed: bool = True) -> str:
        """A random phrasing, with typing variations if `is_typed`; never a held-out one."""
        while True:
            bare = self._grammars[language].sample(rng.choice(intent.questions), rng)
            if _plain(bare) in self._held_out or (language == "ja" and bare.isascii()):
                continue  # "GPU" alone is answered in English
            return self._as_typed(bare, language, intent.name in SHORT_TALK, rng) if is_typed else bare

    def dialogue(self, num_turns: int, rng: random.Random) -> Dialogue:
        turns: list[Turn] = []
        language = rng.choice(LANGUAGES)
        last: Intent | None = None
        while len(turns) < num_turns:
            if turns and rng.random() < 0.1:
                language = rng.choice(LANGUAGES)
            if rng.random() < (0.2 if turns else 0.02):
                turn, last, language = self._follow_up(turns, last, language, rng)
            else:
                last = self._any_intent(language, rng)
                turn = Turn(self.question(last, language, rng), rng.choice(last.answers))
            turns.append(turn)
        system = rng.choice(self._phrases[rng.choice(LANGUAGES)].system) if rng.random() < 0.15 else None
        return Dialogue(tuple(turns), system)

    def held_out(self) -> Iterator[tuple[str, Intent, str]]:
        """(language, intent, question) of every held-out phrasing."""
        for language in LANGUAGES:
            for intent in self.intents[language].values():
                for question in intent.held_out:
                    yield language, intent, question

    def exam(self) -> Iterator[tuple[str, Intent, str]]:
        """(language, intent, question) of every question in `exam.toml`."""
        table = tomllib.loads((HERE / "exam.toml").read_text(encoding="utf-8"))
        for name, questions in table.items():
            for language in LANGUAGES:
                for question in questions[language]:
                    yield language, self.intents[language][name], question

    def texts(self) -> Iterator[str]:
        """Every answer once: training text for the tokenizer."""
        for intents in self.intents.values():
            for intent in intents.values():
                yield from intent.answers
                if intent.more:
                    yield intent.more
        for phrases in self._phrases.values():
            yield phrases.no_more_answer
            yield from phrases.system

    def _any_intent(self, language: str, rng: random.Random) -> Intent:
        (name,) = rng.choices(list(self._weights), list(self._weights.values()))
        return self.intents[language][name]

    def _follow_up(
        self, turns: list[Turn], last: Intent | None, language: str, rng: random.Random
    ) -> tuple[Turn, Intent | None, str]:
        """A message about the previous answer. Returns the turn, the intent that later follow-ups refer to, and the new
        language."""
        kind = rng.choice(("more", "more", "repeat", "switch"))
        if kind == "switch":
            target = rng.choice(LANGUAGES)
            question = self._follow_up_question(self._phrases[target].switch, target, rng)
            answers = self.intents[target][last.name if last else "languages"].answers
            return Turn(question, rng.choice(answers)), last, target
        if kind == "repeat":
            question = self._follow_up_question(self._phrases[language].repeat, language, rng)
            answer = turns[-1].answer if turns else self.intents[language]["help"].answers[0]
            return Turn(question, answer), last, language
        question = self._follow_up_question(self._phrases[language].more, language, rng)
        if not turns:
            return Turn(question, self.intents[language]["help"].answers[0]), None, language
        answer = (self.intents[language][last.name].more if last else None) or self._phrases[language].no_more_answer
        # The intent is forgotten: it has no second answer to "tell me more".
        return Turn(question, answer), None, language

    def _follow_up_question(self, patterns: Sequence[str], language: str, rng: random.Random) -> str:
        bare = self._grammars[language].sample(rng.choice(patterns), rng)
        return self._as_typed(bare, language, True, rng)

    def _as_typed(self, text: str, language: str, is_short: bool, rng: random.Random) -> str:
        phrases = self._phrases[language]
        if not is_short and rng.random() < 0.25:
            text = rng.choice(phrases.openers) + text
        text += rng.choice(phrases.short_endings if is_short else phrases.endings)
        if rng.random() < 0.06:
            text = _with_typo(text, rng)
        return _cased(text, rng) if language == "en" else text


def _intent(name: str, fields: Mapping[str, list[str] | str]) -> Intent:
    unknown = set(fields) - {"questions", "held_out", "answers", "more"}
    if unknown:
        raise ValueError(f"intent {name} has unknown fields: {unknown}")
    more = fields.get("more")
    return Intent(
        name,
        questions=tuple(fields["questions"]),
        held_out=tuple(fields["held_out"]),
        answers=tuple(fields["answers"]),
        more=more if isinstance(more, str) else None,
    )


def _plain(text: str) -> str:
    """Drop case, punctuation and spaces; phrasings that differ only in these are equal."""
    return re.sub(r"\W", "", text.lower())


def _cased(text: str, rng: random.Random) -> str:
    change: Callable[[str], str] = rng.choices(
        (str, lambda t: t[:1].upper() + t[1:], str.lower, str.upper, str.title), (26, 42, 31, 0.7, 0.3)
    )[0]
    return change(text)


def _with_typo(text: str, rng: random.Random) -> str:
    """Drop or double one character, or swap it with the next."""
    if len(text) < 5:
        return text
    at = rng.randrange(1, len(text) - 1)
    return rng.choice(
        (
            text[:at] + text[at + 1 :],
            text[:at] + text[at] + text[at:],
            text[:at] + text[at + 1] + text[at] + text[at + 2 :],
        )
    )
