"""The command `chatstream`. Converts a command line to calls; an error becomes one line on stderr and an exit status.

    app.py        the command tree, and the exit status of every failure
    options.py    the options of the model, common to `serve`, `chat` and `tune`
    serve.py      chatstream serve
    chat.py       chatstream chat: input and output of the terminal
    speakers.py   the backends of `chat`: a model in this process, or a server
    tune.py       chatstream tune
    simulate.py   chatstream simulate

`--help` and `--version` load neither a model library nor a web framework: a command imports them when it runs.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command of this process and exit with its status."""
    try:
        from chatstream.cli.app import run  # imported here, so that Ctrl-C during the import is caught too

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as in shells
