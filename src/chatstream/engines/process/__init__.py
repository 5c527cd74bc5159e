"""Any engine in a child process of its own, which is watched and started anew when it dies.

The event loop shares no interpreter lock with the model, and what kills the model (a segmentation fault, the kernel
when memory runs out, a step that hangs) costs the running generations, not the line.

    engine.py         the engine as its users see it, and the decision to start another child
    child_process.py  one child from its start to its end, seen from the parent
    child.py          the child's own side
    channel.py        what both say to each other, and how it gets across
    environment.py    what libraries read when the child starts
"""

from chatstream.engines.process.engine import ProcessEngine

__all__ = ["ProcessEngine"]
