"""Whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

from codecs import getincrementaldecoder
from itertools import groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import ByteLevel

from chatstream.engines.text.detokenizer import StopStrings, TokenizersDecoder, TokenTexts


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The law, stated on the whole text: up to the stop string that ends first, of those the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def stream(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, list[str]]:
    """What is shown in the end, and what had been shown after each piece."""
    buffer = StopStrings(stops)
    shown, after_each = "", []
    for piece in pieces:
        shown += buffer.push(piece)
        after_each.append(shown)
    return shown + buffer.flush(), after_each


short_text = st.text(alphabet="ab<\n", max_size=12)
stop_strings = st.lists(st.text(alphabet="ab<\n", min_size=1, max_size=4), max_size=3).map(tuple)


@given(st.lists(short_text, max_size=8), stop_strings)
def test_however_the_pieces_break_the_text_ends_before_the_first_stop_string(
    pieces: list[str], stops: tuple[str, ...]
) -> None:
    shown, after_each = stream(pieces, stops)
    assert shown == cut("".join(pieces), stops)
    assert all(shown.startswith(early) for early in after_each)  # nothing shown was ever taken back


@given(short_text, stop_strings)
def test_nothing_is_held_back_longer_than_a_stop_string_can_need(text: str, stops: tuple[str, ...]) -> None:
    buffer = StopStrings(stops)
    shown = buffer.push(text)
    if not buffer.is_hit and not any(stop in text for stop in stops):
        held = text.removeprefix(shown)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_across_three_tokens() -> None:
    assert stream(["Hello <", "hum", "an>: more"], ("<human>:",))[0] == "Hello "


def test_a_beginning_that_came_to_nothing_is_shown_with_several_stop_strings() -> None:
    # The original lost text here: `use <html> tag` arrived as `use ml> tag`.
    assert stream(list("use <html> tag"), ("<human>:", "<|endoftext|>"))[0] == "use <html> tag"


def test_a_beginning_right_before_the_stop_string_does_not_hide_it() -> None:
    # The original missed this one and let the answer run on.
    assert stream(["a\n", "\n", "Q: b"], ("\nQ:",))[0] == "a\n"


def test_the_text_held_back_at_the_end_is_not_lost() -> None:
    assert stream(["Hello <hum"], ("<human>:",))[0] == "Hello <hum"


def test_a_stop_string_within_the_first_token_counts() -> None:
    assert stream(["STOP and more"], ("STOP",))[0] == ""


def byte_tokenizer() -> Tokenizer:
    """One token a byte: every character beyond ASCII is spread over several tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: n for n, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


TOKENIZER = byte_tokenizer()


@given(st.text(max_size=30))
def test_every_piece_is_whole_characters_and_together_they_are_the_text(text: str) -> None:
    decoder = TokenizersDecoder(TOKENIZER)
    pieces = [decoder.push(token) for token in TOKENIZER.encode(text).ids]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_an_answer_cut_off_inside_an_emoji_ends_before_it() -> None:
    decoder = TokenizersDecoder(TOKENIZER)
    ids = TOKENIZER.encode("ok 👩‍🚀").ids
    for length in range(3, len(ids)):
        decoder = TokenizersDecoder(TOKENIZER)
        shown = "".join(decoder.push(token) for token in ids[:length])
        assert "\ufffd" not in shown
        assert "ok 👩‍🚀".startswith(shown)


# --- bytes for what no token stands for: Llama 2, Mistral, Gemma, Phi-3 ---------------------------------------------


def byte_fallback() -> Tokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581you": 256, "日": 257}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.decoder = sentencepiece_like().decoder
    return tokenizer


def readable(token_ids: list[int]) -> str:
    """Words, and of each run of bytes the whole characters before the first byte that makes none."""
    text = ""
    for is_word, run in groupby(token_ids, key=lambda token_id: token_id > 255):
        if is_word:
            text += "".join(" you" if token_id == 256 else "日" for token_id in run)
            continue
        decoder = getincrementaldecoder("utf-8")()
        try:
            for byte in run:
                text += decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            pass
    return text.removeprefix(" ")


some_bytes = st.text(alphabet="é日🍣a", min_size=1, max_size=3).map(lambda text: list(text.encode()))
broken_bytes = st.sampled_from([[0xE3], [0xF0, 0x9F], [0x80], [0xC3]])
words = st.sampled_from([[256], [257]])


@given(st.lists(some_bytes | broken_bytes | words, max_size=8).map(lambda runs: [n for run in runs for n in run]))
@example([*"é".encode(), 0xE3, 256, 257, 256])
def test_a_lone_byte_ends_no_answer_and_costs_no_word(token_ids: list[int]) -> None:
    """Such a byte makes the library take back the whole characters before it, which have been given out."""
    decoder = TokenizersDecoder(byte_fallback())
    pieces = [decoder.push(token_id) for token_id in token_ids]
    assert "".join(pieces).replace("\ufffd", "").removeprefix(" ") == readable(token_ids)


def test_what_a_lone_byte_made_unreadable_is_shown_as_that() -> None:
    decoder = TokenizersDecoder(byte_fallback())
    assert [decoder.push(token_id) for token_id in (*"é".encode(), 0xE3, 256, 256)] == [
        "",
        "é",
        "",
        "\ufffd you",
        " you",
    ]


# --- tokens by themselves -------------------------------------------------------------------------------------------


def sentencepiece_like() -> Tokenizer:
    vocab = {"<0xE3>": 0, "<0x41>": 1, "\u2581": 2, "\u2581you": 3, "you": 4, "日": 5}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


def byte_level() -> Tokenizer:
    vocab = {"ã": 0, "A": 1, "Ġ": 2, "Ġyou": 3, "you": 4, "æĹ¥": 5}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


@pytest.mark.parametrize("tokenizer", [sentencepiece_like(), byte_level()], ids=["sentencepiece", "bytes"])
def test_a_token_by_itself_is_what_it_adds_in_the_middle_of_a_text(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=False))
    assert [texts.of(token_id) for token_id in range(8)] == ["\ufffd", "A", " ", " you", "you", "日", "</s>", ""]


def test_a_token_that_goes_on_with_a_word_is_told_without_its_mark() -> None:
    tokenizer = Tokenizer(WordPiece({"read": 0, "##ing": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    texts = TokenTexts(tokenizer.decode)
    assert [texts.of(token_id) for token_id in (0, 1)] == [" read", "ing"]
