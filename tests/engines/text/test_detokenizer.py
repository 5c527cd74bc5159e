"""Whole characters only, and no text that may be part of a stop string."""

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
    """The specification, on the whole text: cut before the stop string that ends first; of several, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def stream(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, list[str]]:
    """All released text, and the text released after each piece."""
    buffer = StopStrings(stops)
    shown, after_each = "", []
    for piece in pieces:
        shown += buffer.push(piece)
        after_each.append(shown)
    return shown + buffer.flush(), after_each


short_text = st.text(alphabet="ab<\n", max_size=12)
stop_strings = st.lists(st.text(alphabet="ab<\n", min_size=1, max_size=4), max_size=3).map(tuple)


@given(st.lists(short_text, max_size=8), stop_strings)
def test_the_text_ends_before_the_first_stop_string_for_any_pieces(pieces: list[str], stops: tuple[str, ...]) -> None:
    shown, after_each = stream(pieces, stops)
    assert shown == cut("".join(pieces), stops)
    assert all(shown.startswith(early) for early in after_each)  # no released text is retracted


@given(short_text, stop_strings)
def test_only_a_possible_beginning_of_a_stop_string_is_withheld(text: str, stops: tuple[str, ...]) -> None:
    buffer = StopStrings(stops)
    shown = buffer.push(text)
    if not buffer.is_hit and not any(stop in text for stop in stops):
        withheld = text.removeprefix(shown)
        assert not withheld or any(stop.startswith(withheld) for stop in stops)


def test_a_stop_string_across_three_tokens() -> None:
    assert stream(["Hello <", "hum", "an>: more"], ("<human>:",))[0] == "Hello "


def test_a_false_beginning_is_released_with_several_stop_strings() -> None:
    # The original lost text here: `use <html> tag` arrived as `use ml> tag`.
    assert stream(list("use <html> tag"), ("<human>:", "<|endoftext|>"))[0] == "use <html> tag"


def test_a_false_beginning_before_a_stop_string_does_not_hide_it() -> None:
    # The original missed this one and let the answer run on.
    assert stream(["a\n", "\n", "Q: b"], ("\nQ:",))[0] == "a\n"


def test_flush_returns_the_withheld_text() -> None:
    assert stream(["Hello <hum"], ("<human>:",))[0] == "Hello <hum"


def test_a_stop_string_within_the_first_token_counts() -> None:
    assert stream(["STOP and more"], ("STOP",))[0] == ""


def byte_tokenizer() -> Tokenizer:
    """One token per byte: a character outside ASCII consists of several tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: n for n, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


TOKENIZER = byte_tokenizer()


@given(st.text(max_size=30))
def test_pieces_are_whole_characters_and_concatenate_to_the_text(text: str) -> None:
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


# --- byte tokens for unknown characters: Llama 2, Mistral, Gemma, Phi-3 ---------------------------------------------


def byte_fallback() -> Tokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581you": 256, "日": 257}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.decoder = sentencepiece_like().decoder
    return tokenizer


def readable(token_ids: list[int]) -> str:
    """Words, and the whole characters of each run of bytes, up to its first invalid byte."""
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
def test_an_invalid_byte_ends_no_answer_and_loses_no_word(token_ids: list[int]) -> None:
    """The library retracts the whole characters before such a byte, although it has returned them."""
    decoder = TokenizersDecoder(byte_fallback())
    pieces = [decoder.push(token_id) for token_id in token_ids]
    assert "".join(pieces).replace("\ufffd", "").removeprefix(" ") == readable(token_ids)


def test_an_invalid_byte_is_shown_as_a_replacement_character() -> None:
    decoder = TokenizersDecoder(byte_fallback())
    assert [decoder.push(token_id) for token_id in (*"é".encode(), 0xE3, 256, 256)] == [
        "",
        "é",
        "",
        "\ufffd you",
        " you",
    ]


# --- texts of single tokens -----------------------------------------------------------------------------------------


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
def test_the_text_of_a_token_is_its_text_in_the_middle_of_an_answer(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=False))
    assert [texts.of(token_id) for token_id in range(8)] == ["\ufffd", "A", " ", " you", "you", "日", "</s>", ""]


def test_the_text_of_a_continuation_token_has_no_continuation_mark() -> None:
    tokenizer = Tokenizer(WordPiece({"read": 0, "##ing": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    texts = TokenTexts(tokenizer.decode)
    assert [texts.of(token_id) for token_id in (0, 1)] == [" read", "ing"]
