"""Engines: what generates text. They know no HTTP, no queue and no session.

The contract, and how an engine is found:

    base.py        `Engine`, `Preemptible`, `Reporting`: what ChatStream requires of an engine
    choose.py      from a model's name or object to its engine

Engines:

    demo/          the bundled demo model, on numpy
    transformers/  causal language models of Hugging Face, on torch
    openvino/      models exported to OpenVINO's format
    mock.py        scripted text at a fixed pace, without a model
    process/       runs any of the others in a child process

Parts of engines:

    batching/      `StepEngine`: one step generates a token for every running request. demo and transformers use it
    thread/        the engine thread, and how its deltas reach the event loop
    text/          prompts to tokens, tokens to text. For every engine that samples token ids
    loading/       settings, memory and threads with which a model is loaded
    scripted.py    the base class of `MockEngine` and `chatstream.testing.FakeEngine`
"""
