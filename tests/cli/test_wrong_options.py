"""A wrong option is reported in one line on stderr that states what is valid, with exit status 2."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from chatstream.cli.app import run
from tests.cli import command

MOCK = ("--engine", "mock")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serv"], ["serv", "serve"]),
        (["serve", "--prot", "80"], ["--prot", "--port"]),
        (["serve", "--port"], ["--port", "requires"]),
        (["serve", "--port", "http"], ["--port", "http", "whole number"]),
        (["serve", "--port", "70000"], ["--port", "70000", "65535"]),
        (["serve", "one", "two"], ["two", "one MODEL"]),
        (["serve", "--engine", "gpt"], ["gpt", "--engine", "transformers", "mock"]),
        (["serve", "--max-concurrency", "0"], ["--max-concurrency", "between 1 and 1,000,000", "not 0"]),
        (["serve", "--max-concurrency", "1.5"], ["--max-concurrency", "1.5", "whole number", "auto"]),
        (["serve", "--max-queue-size", "many"], ["--max-queue-size", "many", "auto"]),
        (["serve", "--max-waiting-tokens", "0"], ["--max-waiting-tokens", "at least 1"]),
        (["serve", "--ageing", "0"], ["--ageing", "above 0"]),
        (["serve", "--ttft-slo", "0"], ["--ttft-slo", "seconds above 0"]),
        (["serve", "--max-running-per-client", "0"], ["--max-running-per-client", "between 1 and 1,000,000"]),
        (["serve", "--max-waiting-per-client=-1"], ["--max-waiting-per-client", "between 0 and 1,000,000"]),
        (["serve", "--slice-tokens", "0"], ["--slice-tokens", "between 1 and 1,000,000"]),
        (["serve", "--adaptive", "suggest"], ["--adaptive", '"suggest"', '"off", "on"']),
        (["serve", "--itl-target-ms", "0"], ["--itl-target-ms", "> 0"]),
        (["serve", "--itl-target-ms", "inf"], ["--itl-target-ms", "above 0", "inf"]),
        (["serve", "--min-concurrency", "3"], ["--min-concurrency must be at most --max-concurrency (2), not 3"]),
        (["serve", "--max-new-tokens", "1e3"], ["--max-new-tokens", "1e3", "whole number"]),
        (["serve", "--max-queue-size=-1"], ["--max-queue-size", "between 0 and 1,000,000", "not -1"]),
        (["serve", "--policy", "lifo"], ["--policy", "fcfs", "lifo"]),
        (["serve", "--max-wait", "0"], ["--max-wait", "seconds above 0"]),
        (["serve", "--grace=-1"], ["--grace", "seconds, at least 0"]),
        (["serve", *MOCK, "--grace", "inf"], ["--grace", "seconds", "inf"]),
        (["serve", "--stall-timeout", "0"], ["--stall-timeout", "seconds above 0"]),
        (["serve", *MOCK, "--cors-origin", "foo"], ["--cors-origin must be * or like ", "not 'foo'"]),
        (["serve", "--empty-api-key"], ["--empty-api-key", "--help"]),
        (["serve", "--log-level", "loud"], ["--log-level", "loud", "debug"]),
        (["serve", "--max-new-tokens", "0"], ["--max-new-tokens", "between 1 and"]),
        (["serve", "--temperature", "3"], ["--temperature", "between 0 and 2"]),
        (["serve", "--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["serve", "--dtype", "float32"], ["--dtype", "needs a MODEL"]),
        (["serve", "--device", "cpu"], ["--device", "needs a MODEL"]),
        (["serve", "--context-len", "100"], ["--context-len", "needs a MODEL"]),
        (["serve", "--num-threads", "2"], ["--num-threads", "needs a MODEL"]),
        (["serve", "--num-threads", "2.5", "m"], ["--num-threads", "2.5", "whole number"]),
        (["serve", "--num-threads", "0", "m"], ["--num-threads must be a whole number, at least 1"]),
        (["serve", "--prefix-cache-mib=-1", "m"], ["--prefix-cache-mib", '"-1"', ">= 0"]),
        (["tune", "--prefix-cache-mib=-1", "m"], ["--prefix-cache-mib", '"-1"', ">= 0"]),
        (["serve", "--prepack", "off"], ["--prepack", "needs a MODEL"]),
        (["serve", "--cuda-graphs", "auto"], ["--cuda-graphs", "needs a MODEL"]),
        (["serve", "--cuda-graphs", "on", "m"], ["--cuda-graphs", "on", "auto", "off"]),
        (["serve", "--prepack", "maybe", "m"], ["--prepack", "maybe", "auto"]),
        (["serve", "--engine", "transformers"], ["--engine transformers", "needs a MODEL"]),
        (["serve", "./nowhere"], ["./nowhere", "no such directory"]),
        (["serve", "--mock-type", "echo"], ["--mock-type", "needs --engine mock"]),
        (["serve", "--mock-time-per-token", "1"], ["--mock-time-per-token", "needs --engine mock"]),
        (["serve", "--mock-initial-wait", "1"], ["--mock-initial-wait", "needs --engine mock"]),
        (["serve", *MOCK, "--mock-type", "poem"], ["--mock-type", "poem", "round"]),
        (
            ["serve", *MOCK, "--mock-time-per-token=-1"],
            ["--mock-time-per-token", "seconds, at least 0"],
        ),
        (["serve", *MOCK, "--num-threads", "2"], ["--num-threads", "--engine mock"]),
        (["serve", *MOCK, "--dtype", "float32"], ["--dtype", "--engine mock"]),
        (["serve", "some/model", *MOCK], ["--engine mock takes no MODEL", "some/model"]),
        (["serve", *MOCK, "--host", "256.0.0.1", "--port", "0"], ["256.0.0.1"]),
        (["chat", "--api-key", "k"], ["--api-key", "address of a running server"]),
        (["chat", "http://127.0.0.1:1", *MOCK], ["--engine", "running server"]),
        (["chat", "http://127.0.0.1:1", "--system-prompt", "Be brief"], ["--system-prompt", "running server"]),
        (["chat", "some/model", *MOCK], ["--engine mock takes no MODEL"]),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_reported_in_one_line_with_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("chatstream: ")
    for word in words:
        assert word in err


def test_a_wrong_environment_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHATSTREAM_PORT", "http")
    assert run(["serve"]) == 2
    assert "CHATSTREAM_PORT" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "word"), [(["serve", "--prot", "80"], "--port"), (["serve", "./nowhere"], "./")])
def test_the_process_exits_with_one_line_and_status_2(arguments: list[str], word: str) -> None:
    result = command.run(*arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert word in result.stderr


def test_a_port_in_use_is_named_with_the_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = command.run("serve", *MOCK, "--port", port)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"port {port} " in result.stderr
    assert "--port" in result.stderr


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(tmp_path)]) == 2
    assert f"no config.json in {tmp_path}; MODEL is" in capsys.readouterr().err
