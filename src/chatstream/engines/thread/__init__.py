"""Computation off the event loop: the engine thread, and how its deltas reach the event loop.

    engine_thread.py  the thread that loads and runs a model in this process
    handover.py       bounded buffers of deltas between the engine thread and the event loop

Knows no model library and no queue.
"""
