"""No process, thread or file is left behind, whether parent or child ends first; and the parent stays small."""

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
    """Child processes of this process, zombies included."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


async def test_stop_leaves_no_process_thread_or_file_behind(tmp_path: Path) -> None:
    async def start_and_stop(engine: ProcessEngine) -> None:
        await engine.start()
        await generate(engine, "5")
        assert engine.pid is not None
        os.kill(engine.pid, 9)
        await until(lambda: not engine.health().is_ready)
        await generate(engine, "5")
        await engine.stop()

    async with asyncio.timeout(60):
        await start_and_stop(steered(tmp_path))  # starts the event loop's executor thread, which stays
        before = children(), num_threads(), len(os.listdir("/proc/self/fd"))
        engine = steered(tmp_path)
        await start_and_stop(engine)
        await start_and_stop(engine)
        (tmp_path / "load dies").touch()
        with pytest.raises(Exception, match="SIGSEGV"):
            await engine.start()
    assert (children(), num_threads(), len(os.listdir("/proc/self/fd"))) == before


def num_threads() -> int:
    """Threads without those of the event loop's executor, which start on demand and stay."""
    return sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())


def program(folder: Path, text: str) -> subprocess.Popen[str]:
    """Run a user's script: without a `__main__` guard, in a folder of its own."""
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
async def test_the_child_ends_with_the_parent(tmp_path: Path, end: str) -> None:
    with program(tmp_path, STARTED.format(end=f"import os; {end}")) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        _, errors = parent.communicate(timeout=60)
        await until(lambda: not is_alive(pid))
        assert errors == ""


async def test_the_embedding_script_runs_once_without_a_guard_and_loads_no_model_library(
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
        output, errors = parent.communicate(timeout=60)
    assert output.split() == ["main", "started", "token", "token", "done"]
    assert errors == ""


# --- niceness and environment ---------------------------------------------------------------------------------------


async def test_the_child_is_nicer_than_the_parent(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        assert engine.pid is not None
        assert os.getpriority(os.PRIO_PROCESS, engine.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)


async def test_the_child_gets_the_variables_and_the_parent_keeps_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    async with running(tmp_path) as engine:
        child_environment = environment_of(engine.pid)
    # glibc splits the list in place.
    assert "GLIBC_TUNABLES=glibc.malloc.check=0" in child_environment
    assert "glibc.malloc.hugetlb=1" in child_environment
    assert "THP_MEM_ALLOC_ENABLE=1" in child_environment
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


def environment_of(pid: int | None) -> str:
    return Path(f"/proc/{pid}/environ").read_text()
