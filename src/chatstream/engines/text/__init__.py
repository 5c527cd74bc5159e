"""Text to tokens and back, for every engine that samples token ids. Pure.

    chat_template.py   renders a conversation with a checkpoint's chat template
    codec.py           what an engine requires of a tokenizer: `Codec`
    prompt_fitting.py  converts a prompt to tokens that fit the context
    detokenizer.py     tokens to whole characters; stop strings across token borders
    answer.py          one answer: from its tokens to its deltas, up to its end
    logprobs.py        log probabilities by token id to log probabilities by text

Knows no model, no thread, no queue.
"""
