"""The command `chatstream`. Turns words on a command line into calls; what is wrong becomes one line and a status.

    app.py        the command tree, and how every failure ends
    options.py    what `serve` and `chat` have in common: the model
    serve.py      chatstream serve
    chat.py       chatstream chat: what is typed and what is shown
    speakers.py   whom `chat` talks to: a model in this process, or a server

`--help` and `--version` load neither a model library nor a web framework: commands import what they run.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command of this process and exit with its status."""
    try:
        from chatstream.cli.app import run  # here, because it takes a moment, in which Ctrl-C may come

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # as shells count a death by SIGINT
