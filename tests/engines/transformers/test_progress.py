"""A load reports its progress to the log and a callback, and draws no bars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from chatstream.engines.transformers.loader import LoadSettings, load
from chatstream.engines.transformers.progress import LOG_INTERVAL_S, Progress


@pytest.mark.parametrize(("prepack", "last"), [("off", "copying weights"), ("on", "packing weights")])
def test_a_load_reports_its_progress_and_draws_nothing(
    prepack: str,
    last: str,
    checkpoint: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(checkpoint("llama"))
    capfd.readouterr()
    reports: list[tuple[str, float]] = []
    settings = LoadSettings(device="cpu", prepack=prepack)  # type: ignore[arg-type]
    load(path, None, settings, lambda what, share: reports.append((what, share)))
    assert capfd.readouterr().err == ""
    assert reports[0] == ("reading weights", 0.0)
    assert reports[-1] == (last, 1.0)
    assert ("reading weights", 1.0) in reports
    assert len(reports) == len(set(reports))


def test_hook_and_verbosity_of_the_libraries_are_restored_after_an_error() -> None:
    def before(factory: object, args: object, kwargs: object) -> None: ...

    hook_of_the_session = transformers_logging.set_tqdm_hook(before)
    verbosity = transformers_logging.get_verbosity()
    try:
        with pytest.raises(OSError, match="broken"), Progress("m", None).capture_bars():
            raise OSError("broken")
        assert transformers_logging.get_verbosity() == verbosity
        assert transformers_logging.set_tqdm_hook(before) is before
    finally:
        transformers_logging.set_tqdm_hook(hook_of_the_session)


def test_the_callback_gets_each_percent_once_and_the_log_some(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="chatstream")
    now_s = 100.0
    reports: list[tuple[str, float]] = []
    progress = Progress("big", lambda what, share: reports.append((what, share)), now_s=lambda: now_s)
    done = progress.byte_counter("reading weights", 400)
    for call in range(1, 401):
        done(1)
        now_s = 100.0 + call // 100 * LOG_INTERVAL_S
    assert [round(100 * share) for _, share in reports] == list(range(101))
    assert [record.message for record in caplog.records] == [
        "big: reading weights, 26 %",
        "big: reading weights, 51 %",
        "big: reading weights, 76 %",
    ]


def test_a_short_stage_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="chatstream")
    done = Progress("small", None).byte_counter("reading weights", 10)
    done(10)
    assert not caplog.records


def test_the_share_is_at_most_1_with_more_bytes_than_expected() -> None:
    reports: list[float] = []
    progress = Progress("m", lambda what, share: reports.append(share))
    done = progress.byte_counter("packing weights", 0)
    done(0)
    done(5)
    done(5)
    assert reports == [0.0, 1.0]


def test_a_download_is_reported_through_the_bars_of_huggingface_hub(capfd: pytest.CaptureFixture[str]) -> None:
    reports: list[tuple[str, float]] = []
    with Progress("m", lambda what, share: reports.append((what, share))).capture_bars() as bar_class:
        options = {"unit": "B", "unit_scale": True, "total": 200, "initial": 50, "desc": "model.safetensors"}
        with bar_class(**options, disable=None, name="huggingface_hub.http_get") as bar:
            bar.update(50)
            bar.refresh()
            bar.update(100)
        bar_class(total=None).close()
    assert reports[0] == ("downloading weights", 0.25)
    assert ("downloading weights", 0.5) in reports
    assert reports[-1] == ("downloading weights", 1.0)
    assert capfd.readouterr().err == ""
