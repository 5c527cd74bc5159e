"""The sampling and the tables of scripts/mutate. mutmut itself does not run here: it takes minutes."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/mutation_score.py as a module."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    import mutation_score  # type: ignore[import-not-found]

    return mutation_score


def test_every_file_of_the_scheduler_is_mutated() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]["only_mutate"]
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "src/chatstream/scheduler").rglob("*.py")]
    assert len(files) > 30
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in patterns)] == []


def test_a_file_without_mutants_is_reported(score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mutants/src/eta").mkdir(parents=True)
    Path("mutants/src/eta/pace.py.meta").touch()
    assert score.without_mutants([Path("src/eta/pace.py"), Path("src/turns.py")]) == [Path("src/turns.py")]


def test_the_same_seed_draws_the_same_mutants_and_another_seed_others(score: Any) -> None:
    names = [f"chatstream.scheduler.turns.x_{n}" for n in range(1_000)]
    drawn = score.draw(names, 50, seed=2026)
    assert len(set(drawn)) == 50
    assert set(drawn) < set(names)
    assert score.draw(reversed(names), 50, seed=2026) == drawn
    assert score.draw(names, 50, seed=2027) != drawn


@pytest.mark.parametrize("count", [0, 4])
def test_a_sample_larger_than_the_population_is_refused(score: Any, count: int) -> None:
    with pytest.raises(SystemExit, match="there are 3 mutants"):
        score.draw(["a", "b", "c"], count, seed=1)


def test_the_table_counts_by_module_with_the_interval_of_a_sample(score: Any) -> None:
    prefix = "chatstream.scheduler"
    tried = {f"{prefix}.eta.pace.xǁPaceǁadd__mutmut_{n}": "killed" for n in range(94)}
    tried |= {f"{prefix}.turns.x_{n}": "survived" for n in range(5)} | {f"{prefix}.turns.x_5": "timeout"}
    rows = [line.split() for line in score.table(tried, is_sample=True)]
    assert rows[:3] == [
        ["eta.pace", "94", "of", "94", "100.0%"],
        ["turns", "1", "of", "6", "16.7%"],
        ["all", "95", "of", "100", "95.0%"],
    ]
    assert rows[3][-3:] == ["88.8%", "to", "97.8%"]  # Wilson's interval, as in published tables
    assert len(score.table(tried, is_sample=False)) == 3


def test_forget_resets_survivors_and_deletes_mutants_of_removed_files(
    score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("src", "mutants/src"):
        Path(folder).mkdir(parents=True)
    for path in ("src/turns.py", "mutants/src/turns.py", "mutants/src/moved.py", "mutants/src/moved.py.spans"):
        Path(path).touch()
    meta = '{"exit_code_by_key": {"killed": 1, "survived": 0, "untested": 33, "untried": null}}'
    for name in ("turns", "moved"):
        Path(f"mutants/src/{name}.py.meta").write_text(meta)
    score.main(["--forget"])
    assert sorted(path.name for path in Path("mutants/src").iterdir()) == ["turns.py", "turns.py.meta"]
    assert (
        Path("mutants/src/turns.py.meta").read_text()
        == '{"exit_code_by_key": {"killed": 1, "survived": null, "untested": null, "untried": null}}'
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "4"], "--seed needs --sample"),
        (["--sample"], "--sample needs a number"),
        (["--sample", "many"], "whole numbers"),
        (["--sample", "4", "--seed", "-1"], "whole numbers"),
        (["--sample", "4", "chatstream.scheduler.turns.*"], "exclude each other"),
        (["--show", "--sample", "4"], "exclude each other"),
        (["--survivors"], "there is no --survivors"),
    ],
)
def test_invalid_arguments_are_refused_before_any_work(arguments: list[str], words: str) -> None:
    run = subprocess.run([ROOT / "scripts/mutate", *arguments], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert words in run.stderr
