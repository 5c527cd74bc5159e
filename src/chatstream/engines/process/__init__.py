"""Run any engine in a child process that is watched and replaced when it dies.

The event loop shares no interpreter lock with the model. A segmentation fault, the kernel's out-of-memory killer or a
step that hangs ends the running generations; the queue survives.

    engine.py         `ProcessEngine`, and the decision to start another child
    child_process.py  one child process from start to end, seen from the parent
    child.py          the code that runs in the child
    channel.py        the messages between parent and child, and their transport
    environment.py    environment variables that libraries read when the child starts
"""

from chatstream.engines.process.engine import ProcessEngine

__all__ = ["ProcessEngine"]
