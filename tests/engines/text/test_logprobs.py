"""Token ids become text; nothing is told to whoever did not ask."""

from chatstream.engines.text.codec import SampledToken
from chatstream.engines.text.logprobs import token_logprobs
from chatstream.types import TokenLogprob


def test_each_token_is_told_by_its_text() -> None:
    next_token = SampledToken(ord("a"), -0.5, ((ord("b"), -0.25), (ord("a"), -0.5)))
    assert token_logprobs(next_token, chr) == (TokenLogprob("a", -0.5, (("b", -0.25), ("a", -0.5))),)


def test_a_token_alone_is_told_where_no_alternatives_were_asked_for() -> None:
    assert token_logprobs(SampledToken(ord("a"), 0.0), chr) == (TokenLogprob("a", 0.0),)


def test_nothing_is_told_where_nobody_asked() -> None:
    assert token_logprobs(SampledToken(ord("a")), chr) == ()
