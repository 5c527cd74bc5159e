"""Entry point of `python -m chatstream`, the same as the command `chatstream`."""

from __future__ import annotations

from chatstream.cli import main

main()
