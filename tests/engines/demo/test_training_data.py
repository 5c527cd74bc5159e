"""The demo model's training data: complete in both languages, well formed, and without the held-out questions."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "scripts" / "demo_model"))

from dialogues import LANGUAGES, Corpus, Grammar

corpus = Corpus()


def plain(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum() or character == "_")


def test_every_intent_exists_in_both_languages() -> None:
    assert set(corpus.intents["en"]) == set(corpus.intents["ja"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_pattern_is_well_formed(language: str) -> None:
    rng = random.Random(1)
    grammar = corpus.grammar(language)
    for intent in corpus.intents[language].values():
        for pattern in intent.questions:
            assert grammar.sample(pattern, rng) or "?" in pattern


def test_a_pattern_has_choices_options_and_word_lists() -> None:
    grammar = Grammar({"fruit": ["fig"]})
    drawn = {grammar.sample(r"(a|b(c|)) d? <fruit> \+", random.Random(seed)) for seed in range(60)}
    assert drawn == {f"{first} {option}fig +" for first in ("a", "b", "bc") for option in ("", "d ")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_held_out_question_is_never_drawn(language: str) -> None:
    rng = random.Random(2)
    held_out = {plain(text) for questions in (corpus.held_out(), corpus.exam()) for _, _, text in questions}
    for intent in corpus.intents[language].values():
        for _ in range(100):
            assert plain(corpus.question(intent, language, rng, is_typed=False)) not in held_out


def test_the_same_seed_draws_the_same_dialogue() -> None:
    assert corpus.dialogue(6, random.Random(3)) == corpus.dialogue(6, random.Random(3))


def test_no_answer_names_the_unrelated_package_called_chatstream() -> None:
    for text in corpus.texts():
        assert "install chatstream" not in text
