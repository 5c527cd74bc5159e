"""`chatstream tune`: loads an engine, runs `chatstream.tuning`, prints a table with a recommendation."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from chatstream.cli.options import ABOVE_ZERO, DEFAULT_SERVED_MODEL, WHOLE_NUMBER, ServedModelOptions, option
from chatstream.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from chatstream.engines.base import Engine
    from chatstream.tuning import Level, Sweep, SweepSettings


@Parameter(name="*", group=Group("Measuring", sort_key=2))
@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """What is measured, and the target."""

    itl_target_ms: Annotated[float | None, ABOVE_ZERO] = None
    """Target gap between two tokens, in milliseconds, for 99 of 100 gaps. If given, prompts are computed in parts small
    enough to keep it, as with `serve`. [default: 100, with prompts computed as `serve` does by default]"""
    max_streams: Annotated[int, WHOLE_NUMBER] = 64
    """Highest number of concurrent streams to measure."""
    prompt_tokens: Annotated[int, WHOLE_NUMBER] = 64
    """Tokens of each prompt."""
    answer_tokens: Annotated[int, WHOLE_NUMBER] = 128
    """Tokens of each answer, at most; each stream then sends its next request."""
    seconds: Annotated[float, ABOVE_ZERO] = 30.0
    """Seconds for the measurement, without loading the model."""

    @property
    def itl_target_s(self) -> float | None:
        return None if self.itl_target_ms is None else self.itl_target_ms / 1000

    def settings(self, temperature: float | None) -> SweepSettings:
        """The settings of the sweep. Raises `ConfigError`."""
        from chatstream.tuning import SweepSettings

        settings = SweepSettings(
            max_streams=self.max_streams,
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens,
            seconds=self.seconds,
            temperature=temperature,
        )
        return settings if self.itl_target_s is None else replace(settings, itl_target_s=self.itl_target_s)


@Parameter(name="*", group=Group("Output", sort_key=3))
@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOutput:
    """Files written besides the table."""

    json: Path | None = None
    """Write all figures to this file, as JSON."""
    plot: Path | None = None
    """Write charts to this file, .png or .svg."""


DEFAULT_MEASURE = MeasureOptions()
DEFAULT_OUTPUT = TuneOutput()


def tune(
    model: str | None = None,
    /,
    *,
    model_options: ServedModelOptions = DEFAULT_SERVED_MODEL,
    measure: MeasureOptions = DEFAULT_MEASURE,
    output: TuneOutput = DEFAULT_OUTPUT,
) -> None:
    """Measure how many concurrent streams this machine carries with a model, and recommend --max-concurrency.

    For example:

    ```
    chatstream tune
    chatstream tune Qwen/Qwen3-0.6B --itl-target-ms 80 --plot tune.svg
    ```

    Nothing else should compute on the machine meanwhile. Ctrl-C stops the measurement.

    Parameters
    ----------
    model:
        Hugging Face name, or directory of a checkpoint or of an OpenVINO export. [default: the bundled demo model]
    """
    for name, instead in (("max_new_tokens", "--answer-tokens"), ("system_prompt", "--prompt-tokens")):
        model_options.refuse(name, because=f"(CHATSTREAM_{name.upper()}) has no effect here; use {instead}")
    _check_output(output)
    settings = measure.settings(model_options.temperature)
    from chatstream.chat_stream import ChatStream

    engine = ChatStream(**model_options.settings(model), itl_target_s=measure.itl_target_s).engine
    with _progress() as progress:
        found = asyncio.run(_measure(engine, settings, progress))
    title = f"{engine.model_name}: prompts of {settings.prompt_tokens} tokens, answers of {settings.answer_tokens}"
    command = _command(model, model_options, measure, found.recommendation.max_concurrency)
    _print(title, found, command)
    _write(output, title, found, settings, command)


async def _measure(engine: Engine, settings: SweepSettings, progress: Progress) -> Sweep:
    from chatstream.tuning import sweep

    loading = progress.add_task(f"loading {engine.model_name}", total=None)
    await engine.start()
    progress.remove_task(loading)
    # From here on an error is printed as one line or among the reasons, so it must not be logged as well.
    logging.getLogger("chatstream").addHandler(logging.NullHandler())
    bar = progress.add_task("1 stream", total=settings.seconds)
    clock = asyncio.create_task(_keep_time(progress, bar))

    def show(num_streams: int) -> None:
        progress.update(bar, description=f"{num_streams} stream{'s' if num_streams > 1 else ''}")

    try:
        return await sweep(engine, settings, on_level=show)
    finally:
        clock.cancel()
        await engine.stop()


async def _keep_time(progress: Progress, bar: TaskID) -> None:
    while True:
        await asyncio.sleep(0.1)
        progress.update(bar, advance=0.1)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on stderr, removed at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def _command(model: str | None, options: ServedModelOptions, measure: MeasureOptions, max_concurrency: int) -> str:
    """The command line of a server with the recommended settings."""
    words = ["chatstream", "serve"] + ([model] if model is not None else [])
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            words += [option(field.name), str(value)]
    words += ["--max-concurrency", str(max_concurrency)]
    if measure.itl_target_ms is not None:
        words += ["--itl-target-ms", f"{measure.itl_target_ms:g}"]
    return shlex.join(words)


# --- output -----------------------------------------------------------------------------------------------------------

COLUMNS = ("streams", "tokens/s", "curve", "each", "gap p50", "p90", "p99", "TTFT")


def _row(level: Level, found: Sweep) -> list[str]:
    law = found.recommendation.law
    return [
        str(level.num_streams),
        _rate(level.tokens_per_s),
        _rate(level.num_streams / law.step_s(level.num_streams)) if law is not None and law.is_good else "–",
        _rate(level.tokens_per_s / level.num_streams),
        *(_ms(seconds) for seconds in (level.itl_p50_s, level.itl_p90_s, level.itl_p99_s, level.ttft_s)),
    ]


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 99.95 else f"{per_s:.1f}"


def _ms(seconds: float) -> str:
    """Milliseconds as text; a dash if no stream joined (infinite)."""
    if not isfinite(seconds):
        return "–"
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _print(title: str, found: Sweep, command: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for level in found.levels:
        is_recommended = level.num_streams == found.recommendation.max_concurrency
        table.add_row(*_row(level, found), style="bold" if is_recommended else None)
    console = Console(highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    for sentence in found.recommendation.why:
        console.print(sentence, markup=False)
    console.print(f"\n{command}", markup=False, soft_wrap=True)


# --- files ------------------------------------------------------------------------------------------------------------


def _check_output(output: TuneOutput) -> None:
    """Check the output paths before the measurement. Raises `ConfigError`."""
    if output.json is not None and not output.json.parent.is_dir():
        raise ConfigError(f"json: there is no folder {output.json.parent}", param="json")
    if output.plot is not None:
        from chatstream.tuning import plot

        plot.check_can_write(output.plot)


def _write(output: TuneOutput, title: str, found: Sweep, settings: SweepSettings, command: str) -> None:
    if output.json is not None:
        with _one_line("json", output.json):
            text = json.dumps(_as_json(title, found, settings, command), indent=2)
            output.json.write_text(text + "\n", encoding="utf-8")
    if output.plot is not None:
        from chatstream.tuning import plot

        with _one_line("plot", output.plot):
            plot.write(found, output.plot, title=title, itl_target_s=settings.itl_target_s)


@contextmanager
def _one_line(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{name} cannot be written to {path}: {error.strerror or error}", param=name) from error


def _as_json(title: str, found: Sweep, settings: SweepSettings, command: str) -> dict[str, Any]:
    recommendation = asdict(found.recommendation)
    return {
        "title": title,
        "settings": asdict(settings),
        # JSON has no infinity, the value of a level that no stream joined.
        "levels": [asdict(one) | {"ttft_s": one.ttft_s if isfinite(one.ttft_s) else None} for one in found.levels],
        "law": recommendation.pop("law"),
        "why_ended": found.why_ended,
        "engine_failed": found.engine_failed,
        "recommendation": recommendation,
        "command": command,
    }
