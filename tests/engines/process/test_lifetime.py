"""Nothing is left behind, whoever ends first; and the parent stays as small as it was."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chatstream.engines.process import ProcessEngine
from chatstream.engines.process.child import NICENESS
from tests.cli.command import environment
from tests.engines.process.steered import generate, is_alive, running, steered, until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc"),
]

ROOT = Path(__file__).parents[3]


def children() -> set[int]:
    """Of this process, zombies too."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


async def test_a_stop_leaves_no_process_no_thread_and_no_file_behind(tmp_path: Path) -> None:
    async def one_life(engine: ProcessEngine) -> None:
        await engine.start()
        await generate(engine, "5")
        assert engine.pid is not None
        os.kill(engine.pid, 9)
        await until(lambda: not engine.health().is_ready)
        await generate(engine, "5")
        await engine.stop()

    async with asyncio.timeout(60):
        await one_life(steered(tmp_path))  # the loop's own thread for waiting is there from now on
        before = children(), num_threads(), len(os.listdir("/proc/self/fd"))
        engine = steered(tmp_path)
        await one_life(engine)
        await one_life(engine)
        (tmp_path / "load dies").touch()
        with pytest.raises(Exception, match="SIGSEGV"):
            await engine.start()
    assert (children(), num_threads(), len(os.listdir("/proc/self/fd"))) == before


def num_threads() -> int:
    """Without the event loop's own, which come when they are wanted and stay."""
    return sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())


def program(folder: Path, text: str) -> subprocess.Popen[str]:
    """A script as somebody might write it: without a guard, in a folder of its own."""
    script = folder / "script.py"
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script)],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


STARTED = """
import asyncio, sys
from functools import partial
from chatstream.engines.process import ProcessEngine
from tests.engines.process.steered import Steered

async def main():
    engine = ProcessEngine(partial(Steered, "."))
    await engine.start()
    print(engine.pid, flush=True)
    sys.stdin.read()
    {end}

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)", "sys.exit()", "pass", "await engine.stop()"])
async def test_when_the_parent_is_gone_so_is_the_child(tmp_path: Path, end: str) -> None:
    with program(tmp_path, STARTED.format(end=f"import os; {end}")) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        _, complaints = parent.communicate(timeout=60)
        await until(lambda: not is_alive(pid))
        assert complaints == ""


async def test_the_script_of_whoever_embeds_it_runs_once_needs_no_guard_and_loads_no_model_library(
    tmp_path: Path,
) -> None:
    script = """
import asyncio, sys
from chatstream import ChatStream

print("main")
ChatStream("somebody/some-model", engine_in="process")

async def main():
    async with ChatStream(engine_in="process") as chat_stream:
        async for event in chat_stream.stream("Hello", max_new_tokens=2):
            print(event.type)

asyncio.run(main())
print(*{"torch", "transformers", "numpy"} & set(sys.modules))
"""
    with program(tmp_path, script) as parent:
        said, complaints = parent.communicate(timeout=60)
    assert said.split() == ["main", "started", "token", "token", "done"]
    assert complaints == ""


# --- beside the server ---------------------------------------------------------------------------------------------


async def test_the_child_computes_behind_the_server_that_answers(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        assert engine.pid is not None
        assert os.getpriority(os.PRIO_PROCESS, engine.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)


async def test_the_child_begins_with_them_and_the_parent_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    async with running(tmp_path) as engine:
        began_with = environment_of(engine.pid)
    # glibc cuts the list into pieces where it lies.
    assert "GLIBC_TUNABLES=glibc.malloc.check=0" in began_with
    assert "glibc.malloc.hugetlb=1" in began_with
    assert "THP_MEM_ALLOC_ENABLE=1" in began_with
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


def environment_of(pid: int | None) -> str:
    return Path(f"/proc/{pid}/environ").read_text()
