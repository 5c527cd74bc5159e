"""The command `chatstream`. Turns words on a command line into calls; what is wrong becomes one line and a status.

    app.py        the command tree, and how every failure ends
    options.py    what `serve` and `chat` have in common: the model
    serve.py      chatstream serve
    chat.py       chatstream chat: what is typed and what is shown
    speakers.py   whom `chat` talks to: a model in this process, or a server

`--help` and `--version` load neither a model library nor a web framework: commands import what they run.
"""

from __future__ import annotations

from chatstream.cli.app import main

__all__ = ["main"]
