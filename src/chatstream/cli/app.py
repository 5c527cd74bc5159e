"""The command tree. Every failure ends with one line on stderr and an exit status.

0: success, also after a stop by a signal. 1: the command failed. 2: an option or a setting is wrong.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import fields
from importlib.metadata import version

from cyclopts import App, CycloptsError, UnusedCliTokensError
from cyclopts.config import Env

from chatstream.cli.chat import chat
from chatstream.cli.options import ServedModelOptions, option
from chatstream.cli.serve import HttpOptions, QueueOptions, serve
from chatstream.cli.simulate import simulate
from chatstream.cli.tune import MeasureOptions, tune
from chatstream.errors import ChatStreamError, ConfigError, InvalidRequest

_OPTION_NAMES = {
    "max_wait_s": "--max-wait",
    "ageing_s": "--ageing",
    "itl_target_s": "--itl-target-ms",
    "prefix_cache_bytes": "--prefix-cache-mib",
    "grace_s": "--grace",
    "cors_origins": "--cors-origin",
    "api_keys": "--api-key",
    "reader_stall_timeout_s": "--stall-timeout",
    "ttft_slo_s": "--ttft-slo",
    "time_per_token_s": "--time-per-token",
    "max_attempts": "--attempts",
    "patience_s": "--patience",
}
"""Settings whose option has another name."""
_OPTIONS = {
    field.name: option(field.name)
    for group in (ServedModelOptions, QueueOptions, HttpOptions, MeasureOptions)
    for field in fields(group)
    if "_" in field.name  # names without an underscore are also plain English words
} | _OPTION_NAMES
"""Setting to option, for messages that name several settings."""

app = App(
    name="chatstream",
    help="A queue and an exact limit in front of text generation.",
    version=lambda: f"chatstream {version('openchatstream')}",
    config=Env("CHATSTREAM_", command=False, show=False),
    help_epilogue=(
        "Every option is also an environment variable: --max-wait is CHATSTREAM_MAX_WAIT. "
        "The command line takes precedence. See `chatstream COMMAND --help` for the options."
    ),
)
app.command(serve, usage="Usage: chatstream serve [MODEL] [OPTIONS]")
app.command(chat, usage="Usage: chatstream chat [MODEL|URL] [OPTIONS]")
app.command(simulate, usage="Usage: chatstream simulate [OPTIONS]")
app.command(tune, usage="Usage: chatstream tune [MODEL] [OPTIONS]")


def run(arguments: list[str]) -> int:
    """Run a command and return its exit status."""
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except UnusedCliTokensError as error:
        return _fail(f"unexpected {' '.join(error.unused_tokens or [])!r}; give one MODEL at most, and options", 2)
    except CycloptsError as error:
        return _fail(f"{error} (see --help)", 2)
    except (ConfigError, InvalidRequest) as error:
        return _fail(_in_options(error), 2)
    except ChatStreamError as error:
        return _fail(error.message, 1)
    except BrokenPipeError:
        # The reader of stdout has closed it (`chatstream chat | head`). Prevent Python's error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    print("chatstream:", " ".join(message.split()), file=sys.stderr)
    return status


def _in_options(error: ConfigError | InvalidRequest) -> str:
    """The message, with the names of settings replaced by those of options."""
    if error.param is None:
        return error.message
    name = _OPTIONS.get(error.param) or option(error.param)
    message = re.sub(rf"\b{re.escape(error.param)}\b", name, error.message, count=1)
    return re.sub(rf"\b({'|'.join(_OPTIONS)})\b", lambda setting: _OPTIONS[setting[0]], message)
