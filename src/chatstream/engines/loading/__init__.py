"""Decisions that all engines share when they load a model.

    settings.py             the settings of loading, as one value
    memory.py               free memory of the machine, or of its container
    cpu_threads.py          number of CPU threads
    checkpoint_defaults.py  context, sampling and answer length that a checkpoint recommends

Knows no engine.
"""
