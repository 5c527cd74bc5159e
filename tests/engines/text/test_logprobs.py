"""Log probabilities by token id are converted to log probabilities by text, if requested."""

from chatstream.engines.text.codec import SampledToken
from chatstream.engines.text.logprobs import token_logprobs
from chatstream.types import TokenLogprob


def test_token_ids_are_converted_to_texts() -> None:
    next_token = SampledToken(ord("a"), -0.5, ((ord("b"), -0.25), (ord("a"), -0.5)))
    assert token_logprobs(next_token, chr) == (TokenLogprob("a", -0.5, (("b", -0.25), ("a", -0.5))),)


def test_without_alternatives_only_the_token_is_returned() -> None:
    assert token_logprobs(SampledToken(ord("a"), 0.0), chr) == (TokenLogprob("a", 0.0),)


def test_log_probabilities_are_returned_only_if_requested() -> None:
    assert token_logprobs(SampledToken(ord("a")), chr) == ()
