"""The wheel, installed without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cli import command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build as for a release, but with the installed build tools."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("openchatstream-*-py3-none-any.whl"))


def test_the_wheel_is_small_and_complete(wheel: Path) -> None:
    assert wheel.stat().st_size < 6_000_000
    source = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()}
    wanted = {name for name in source if "__pycache__" not in name}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wanted <= names
    assert {name.split("/")[0] for name in names - wanted} == {wheel.name.rsplit("-py3", 1)[0] + ".dist-info"}
    for needed in ("py.typed", "web/index.html", "engines/demo/checkpoint/model.safetensors"):
        assert f"chatstream/{needed}" in names


def test_the_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    env = command.environment(PYTHONPATH=os.fspath(tmp_path))
    where = subprocess.run(
        [sys.executable, "-c", "import chatstream; print(chatstream.__file__)"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(os.fspath(tmp_path))
    with command.serving(env=env) as server, server.client() as client:
        assert "ChatStream" in client.get("/").text
        answer = client.post("/chat_stream", json={"user_input": "What is a slot?"})
        assert answer.text.endswith("<::EOS::>")
