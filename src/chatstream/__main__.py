"""`python -m chatstream` is the command `chatstream`."""

from __future__ import annotations

from chatstream.cli import main

main()
