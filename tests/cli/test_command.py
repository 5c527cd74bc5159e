"""The command as a whole: version, help, and imports."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from chatstream.cli.app import app
from tests.cli import command


def test_version_is_that_of_the_distribution() -> None:
    result = command.run("--version")
    assert (result.returncode, result.stdout) == (0, f"chatstream {version('openchatstream')}\n")


def test_without_a_command_the_help_is_printed() -> None:
    result = command.run()
    assert result.returncode == 0
    assert "serve" in result.stdout
    assert "chat" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["serve", "--help"], ["chat", "--help"], ["simulate", "--help"], ["tune", "--help"]],
    ids=" ".join,
)
def test_help_and_version_import_no_model_library_and_no_web_framework(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "chatstream", *arguments],
        env=command.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.split("|")[-1].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "cyclopts" in loaded
    heavy = {"fastapi", "starlette", "pydantic", "uvicorn", "httpx2", "numpy", "tokenizers", "torch", "transformers"}
    assert not loaded & (heavy | {"matplotlib"})


def test_ctrl_c_during_the_import_exits_silently(tmp_path: Path) -> None:
    """Ctrl-C in the first 0.1 s once printed a traceback."""
    (tmp_path / "cyclopts.py").write_text("import signal\n\nsignal.raise_signal(signal.SIGINT)\n")
    result = command.run("serve", env=command.environment(PYTHONPATH=str(tmp_path)))
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize("name", ["serve", "chat", "simulate", "tune"])
def test_help_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    app([name, "--help"], result_action="return_value")
    text = capsys.readouterr().out
    options = {option for argument in app[name].assemble_argument_collection() for option in argument.names}
    options = {option for option in options if option.startswith("--")}
    assert len(options) > 5
    for option in options:
        # The name, the type (except for a flag), and a sentence.
        assert re.search(rf"{option} ([A-Z|]+(\.\.\.)?)? *[A-Z]\w+ ", text), option
