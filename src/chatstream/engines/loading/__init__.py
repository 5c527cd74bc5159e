"""What every engine decides while it loads a model.

    settings.py             how a model is loaded, as one value
    memory.py               how much memory the machine, or its container, has left
    cpu_threads.py          with how many threads to compute
    checkpoint_defaults.py  context, sampling and answer length that a checkpoint recommends

Knows no engine.
"""
