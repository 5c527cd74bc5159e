"""A load says how far it is, in the log and to whoever asks, and draws no bars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from chatstream.engines.transformers.loader import LoadSettings, load
from chatstream.engines.transformers.progress import LOG_INTERVAL_S, Progress


@pytest.mark.parametrize(("prepack", "last"), [("off", "copying weights"), ("on", "packing weights")])
def test_a_load_tells_its_progress_and_draws_nothing(
    prepack: str,
    last: str,
    checkpoint: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(checkpoint("llama"))
    capfd.readouterr()
    told: list[tuple[str, float]] = []
    settings = LoadSettings(device="cpu", prepack=prepack)  # type: ignore[arg-type]
    load(path, None, settings, lambda what, share: told.append((what, share)))
    assert capfd.readouterr().err == ""
    assert told[0] == ("reading weights", 0.0)
    assert told[-1] == (last, 1.0)
    assert ("reading weights", 1.0) in told
    assert len(told) == len(set(told))


def test_the_libraries_are_as_before_also_after_an_error() -> None:
    def before(factory: object, args: object, kwargs: object) -> None: ...

    mine = transformers_logging.set_tqdm_hook(before)
    verbosity = transformers_logging.get_verbosity()
    try:
        with pytest.raises(OSError, match="broken"), Progress("m", None).of_libraries():
            raise OSError("broken")
        assert transformers_logging.get_verbosity() == verbosity
        assert transformers_logging.set_tqdm_hook(before) is before
    finally:
        transformers_logging.set_tqdm_hook(mine)


def test_the_caller_hears_of_each_percent_once_the_log_of_some(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="chatstream")
    now_s = 100.0
    told: list[tuple[str, float]] = []
    progress = Progress("big", lambda what, share: told.append((what, share)), now_s=lambda: now_s)
    done = progress.bytes_of("reading weights", 400)
    for call in range(1, 401):
        done(1)
        now_s = 100.0 + call // 100 * LOG_INTERVAL_S
    assert [round(100 * share) for _, share in told] == list(range(101))
    assert [record.message for record in caplog.records] == [
        "big: reading weights, 26 %",
        "big: reading weights, 51 %",
        "big: reading weights, 76 %",
    ]


def test_what_takes_no_time_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="chatstream")
    done = Progress("small", None).bytes_of("reading weights", 10)
    done(10)
    assert not caplog.records


def test_bytes_that_were_not_expected_are_still_at_most_all() -> None:
    told: list[float] = []
    progress = Progress("m", lambda what, share: told.append(share))
    done = progress.bytes_of("packing weights", 0)
    done(0)
    done(5)
    done(5)
    assert told == [0.0, 1.0]


def test_a_download_is_told_as_the_hub_library_makes_its_bars(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, float]] = []
    with Progress("m", lambda what, share: told.append((what, share))).of_libraries() as bar_class:
        options = {"unit": "B", "unit_scale": True, "total": 200, "initial": 50, "desc": "model.safetensors"}
        with bar_class(**options, disable=None, name="huggingface_hub.http_get") as bar:
            bar.update(50)
            bar.refresh()
            bar.update(100)
        bar_class(total=None).close()
    assert told[0] == ("downloading weights", 0.25)
    assert ("downloading weights", 0.5) in told
    assert told[-1] == ("downloading weights", 1.0)
    assert capfd.readouterr().err == ""
