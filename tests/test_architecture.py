"""The import rules of ARCHITECTURE.md, and the names that tests may use. The source is parsed, not imported.

An import under `if TYPE_CHECKING` is not a dependency. It counts where a room must not even name the other.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
FILES = sorted(SOURCE.rglob("*.py"))
ABOVE_THE_FACADE = ("chatstream.api", "chatstream.cli", "chatstream.server", "chatstream.web", "chatstream.__main__")
CONCRETE_ENGINES = (
    "chatstream.engines.demo",
    "chatstream.engines.mock",
    "chatstream.engines.openvino",
    "chatstream.engines.transformers",
)
MATPLOTLIB_IN = ("chatstream.simulation.report", "chatstream.tuning.plot")


@dataclass(frozen=True)
class Import:
    importer: str
    """The importing module."""
    imported: str
    is_at_once: bool
    """The import runs when the importer is loaded: it is not in a function or for the type checker only."""

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}"


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    later = {id(inner) for outer in ast.walk(tree) if is_later(outer) for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: only absolute imports, so that this test can read them"
            # A name may be a module of the package or a member of it.
            names = [as_module(f"{node.module}.{alias.name}") or str(node.module) for alias in node.names]
        else:
            continue
        yield from (Import(name_of(file), name, id(node) not in later) for name in names)


def is_later(node: ast.AST) -> bool:
    is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return is_typing or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def as_module(name: str) -> str | None:
    return name if name in MODULES else None


MODULES = {name_of(file) for file in FILES}
IMPORTS = [one for file in FILES for one in imports_of(file)]


def is_in(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def imports_from(*rooms: str) -> list[Import]:
    return [one for one in IMPORTS if is_in(one.importer, *rooms)]


def is_stdlib(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def room_of(module: str) -> str:
    """The second part of the path; each engine is a room of its own."""
    parts = module.split(".")
    return ".".join(parts[:3] if parts[1:2] == ["engines"] else parts[:2])


def test_the_source_and_the_rooms_named_here_were_found() -> None:
    assert len(FILES) > 40
    assert len(IMPORTS) > 200
    assert {room_of(module) for module in MODULES} >= {*ABOVE_THE_FACADE, *CONCRETE_ENGINES}


@pytest.mark.parametrize(
    ("room", "may_import"),
    [
        ("chatstream.errors", ()),
        ("chatstream.checks", ("chatstream.errors",)),
        ("chatstream.types", ("chatstream.checks", "chatstream.errors")),
        ("chatstream.scheduler", ("chatstream.types", "chatstream.checks", "chatstream.errors")),
        ("chatstream.runtime", ("chatstream.scheduler", "chatstream.types", "chatstream.checks", "chatstream.errors")),
        (
            "chatstream.metrics",
            ("chatstream.scheduler", "chatstream.engines.base", "chatstream.errors", "prometheus_client"),
        ),
        ("chatstream.simulation", ("chatstream.scheduler", "chatstream.checks", "chatstream.errors", "matplotlib")),
        ("chatstream.tuning.curve", ("numpy",)),
        ("chatstream.tuning.recommend", ("chatstream.scheduler.limits.adaptive", "chatstream.tuning.curve", "numpy")),
    ],
)
def test_the_lower_rooms_import_the_standard_library_and_what_is_below_them(
    room: str, may_import: tuple[str, ...]
) -> None:
    forbidden = [
        one for one in imports_from(room) if not is_stdlib(one.imported) and not is_in(one.imported, room, *may_import)
    ]
    assert forbidden == []


def test_the_scheduler_has_no_clock_no_loop_no_log_no_randomness() -> None:
    impure = ("asyncio", "concurrent", "datetime", "logging", "os", "random", "secrets", "socket", "threading", "time")
    assert [one for one in imports_from("chatstream.scheduler") if is_in(one.imported, *impure)] == []


def test_the_simulation_has_no_clock_and_no_loop() -> None:
    real = ("asyncio", "anyio", "datetime", "threading", "time")
    assert [one for one in imports_from("chatstream.simulation") if is_in(one.imported, *real)] == []


def test_types_checks_and_errors_are_values_without_a_loop_or_a_log() -> None:
    impure = ("asyncio", "logging", "threading", "time")
    rooms = ("chatstream.types", "chatstream.checks", "chatstream.errors")
    assert [one for one in imports_from(*rooms) if is_in(one.imported, *impure)] == []


def test_only_the_runtime_and_rooms_above_it_import_the_scheduler() -> None:
    below = (
        "chatstream.engines",
        "chatstream.sessions",
        "chatstream.access",
        "chatstream.engines.text.chat_template",
        "chatstream.web",
    )
    known = ("chatstream.scheduler", "chatstream.runtime")
    assert [one for one in imports_from(*below) if is_in(one.imported, *known)] == []


def test_engines_import_no_http_no_queue_no_session() -> None:
    foreign = [
        one
        for one in imports_from("chatstream.engines")
        if is_in(one.imported, "chatstream", "fastapi", "starlette", "uvicorn", "pydantic", "httpx2")
        and not is_in(
            one.imported,
            "chatstream.engines",
            "chatstream.types",
            "chatstream.checks",
            "chatstream.errors",
            "chatstream.engines.text.chat_template",
        )
    ]
    assert foreign == []


def test_only_the_choice_of_an_engine_imports_a_concrete_one() -> None:
    """`choose` imports all engines; the settings and the command line create the mock; the package exports it."""
    may_mock = ("chatstream", "chatstream.config", "chatstream.cli.options")
    wrong = [
        one
        for one in IMPORTS
        if is_in(one.imported, *CONCRETE_ENGINES)
        and room_of(one.importer) != room_of(one.imported)
        and one.importer != "chatstream.engines.choose"
        and not (one.importer in may_mock and one.imported == "chatstream.engines.mock")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("library", "room"),
    [
        ("torch", "chatstream.engines.transformers"),
        ("transformers", "chatstream.engines.transformers"),
        ("openvino", "chatstream.engines.openvino"),
        ("openvino_genai", "chatstream.engines.openvino"),
        ("numpy", ("chatstream.engines.demo", "chatstream.tuning", "chatstream.engines.openvino")),
        ("safetensors", ("chatstream.engines.demo", "chatstream.engines.transformers")),
        ("loky", "chatstream.engines"),
        ("tokenizers", "chatstream.engines"),
        ("jinja2", ("chatstream.engines.text.chat_template", "chatstream.engines.transformers")),
        ("itsdangerous", "chatstream.access"),
        ("pydantic", "chatstream.api"),
        ("pydantic_core", "chatstream.api"),
        ("uvicorn", "chatstream.server"),
        ("cyclopts", "chatstream.cli"),
        ("rich", "chatstream.cli"),
        ("httpx2", "chatstream.cli"),
        ("matplotlib", MATPLOTLIB_IN),
        ("prometheus_client", "chatstream.metrics.prometheus"),
        ("platformdirs", "chatstream.tuning.cache"),
    ],
)
def test_a_library_is_imported_in_one_room(library: str, room: str | tuple[str, ...]) -> None:
    users = [one for one in IMPORTS if is_in(one.imported, library)]
    assert users, f"no module imports {library}"
    rooms = (room,) if isinstance(room, str) else room
    assert [one for one in users if not is_in(one.importer, *rooms)] == []


def test_without_extras_every_module_that_is_not_optional_can_be_imported() -> None:
    """The demo model, which must run without extras, once imported a library that only an extra installs."""
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {re.split(r"[^A-Za-z0-9_-]", wanted)[0].replace("-", "_") for wanted in project["dependencies"]}
    transitive = {"starlette", "pydantic_core"}
    optional = ("chatstream.engines.openvino", "chatstream.engines.transformers", *MATPLOTLIB_IN)
    optional += ("chatstream.engines.loading.cpu_threads",)  # used only by the first two
    assert all(is_in(one.importer, *optional) for one in IMPORTS if is_in(one.imported, optional[-1]))
    foreign = {
        one.imported.partition(".")[0]: one
        for one in IMPORTS
        if not is_in(one.importer, *optional) and not is_in(one.imported, "chatstream", *sys.stdlib_module_names)
    }
    assert {name: str(one) for name, one in foreign.items() if name not in installed | transitive} == {}


def test_only_http_rooms_import_a_web_framework() -> None:
    """The facade imports `Request` and `Response` for the type checker only."""
    rooms = ("chatstream.api", "chatstream.web", "chatstream.access", "chatstream.server")
    users = [one for one in IMPORTS if is_in(one.imported, "fastapi", "starlette") and not is_in(one.importer, *rooms)]
    assert {one.importer for one in users} == {"chatstream.chat_stream"}
    assert not any(one.is_at_once for one in users)


def test_pure_modules_import_no_event_loop() -> None:
    pure = ("chatstream.access", "chatstream.engines.text.chat_template", "chatstream.sessions", "chatstream.web")
    pure += ("chatstream.engines.base", "chatstream.engines.choose", "chatstream.engines.text.detokenizer")
    models = ("chatstream.engines.demo", "chatstream.engines.transformers")
    assert [one for one in imports_from(*pure, *models) if is_in(one.imported, "asyncio", "anyio")] == []


def test_no_room_imports_upwards_while_it_loads() -> None:
    """The facade imports `api` only when its router is used."""
    graph: dict[str, set[str]] = {}
    for one in IMPORTS:
        importer, imported = room_of(one.importer), room_of(one.imported)
        if one.is_at_once and is_in(imported, "chatstream") and importer != imported:
            graph.setdefault(importer, set()).add(imported)
    try:
        order = [*TopologicalSorter(graph).static_order()]
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert order.index("chatstream.scheduler") < order.index("chatstream.runtime")
    assert order.index("chatstream.runtime") < order.index("chatstream.chat_stream") < order.index("chatstream.api")


def test_only_the_facade_imports_upwards_and_only_its_endpoints() -> None:
    up = [one for one in imports_from("chatstream.chat_stream") if is_in(one.imported, "chatstream.api")]
    assert {one.imported for one in up} == {"chatstream.api.app", "chatstream.api.native"}
    assert not any(one.is_at_once for one in up)
    others = [
        one for one in IMPORTS if is_in(one.imported, *ABOVE_THE_FACADE) and not is_in(one.importer, *ABOVE_THE_FACADE)
    ]
    assert {one.importer for one in others} == {"chatstream.chat_stream"}


def test_the_package_does_not_need_its_own_doubles() -> None:
    users = [one for one in IMPORTS if is_in(one.imported, "chatstream.testing")]
    assert [one for one in users if not is_in(one.importer, "chatstream.testing")] == []


def test_no_module_is_a_collection_of_helpers() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "lib", "stuff"}
    assert {part for module in MODULES for part in module.split(".")} & vague == set()


def test_every_module_has_a_docstring() -> None:
    undocumented = [file for file in FILES if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))]
    assert undocumented == []


FOREIGN_PRIVATES = {
    "_replace": "the public method of a named tuple",
    "_local_scalar_dense": "the name of an operator of torch",
    "_unique2": "the name of an operator of torch",
    "_schema": "of an operator of torch: the only source for whether it writes to its arguments",
    "_attn_implementation": "of a configuration of transformers: the only source for the attention in force",
    "_iter_events": "of a stream of openai: the only source for the ids of the events",
}
"""Private names of foreign objects, and why a test reads them."""


def test_tests_use_no_private_attribute_of_foreign_objects() -> None:
    """A private name is used on `self`, `cls` and `super()`, and elsewhere only where the same file defines it.

    A test that replaces a method names it in a string: `monkeypatch.setattr`.
    """
    touched, foreign = [], set()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        own = {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in privates_of(node)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and is_private(node.attr)) or is_myself(node.value):
                continue
            if node.attr in FOREIGN_PRIVATES:
                foreign.add(node.attr)
            elif node.attr not in own:
                touched.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    assert touched == []
    assert foreign == set(FOREIGN_PRIVATES), "every listed name is read by a test"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def is_myself(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def privates_of(kind: ast.ClassDef) -> Iterator[str]:
    """Methods, and names assigned in the class or to `self`."""
    for node in ast.walk(kind):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def test_importing_the_package_loads_no_model_library_and_no_web_framework() -> None:
    program = "import json, sys, chatstream; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    heavy = {"torch", "transformers", "fastapi", "starlette", "uvicorn", "pydantic", "numpy", "tokenizers", "httpx2"}
    heavy.add("prometheus_client")
    assert "chatstream" in loaded
    assert heavy & set(loaded) == set()


def test_the_names_without_http_and_without_a_model_load_neither() -> None:
    """The demo model and the mock need no torch; values need no facade."""
    program = """
import json, sys
from chatstream import LoadSettings, Message, MockEngine, SchedulerSettings, RuntimeSettings
print(json.dumps(sorted(sys.modules)))
"""
    loaded = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert {"torch", "transformers", "fastapi", "starlette", "numpy"} & set(loaded) == set()


def test_the_demo_model_needs_no_torch() -> None:
    program = """
import asyncio, json, sys
from chatstream import ChatStream

async def main():
    async with ChatStream() as chat_stream:
        async for _ in chat_stream.stream("Hello", max_new_tokens=2):
            pass

asyncio.run(main())
print(json.dumps(sorted(sys.modules)))
"""
    loaded = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert "numpy" in loaded
    assert {"torch", "transformers", "fastapi", "prometheus_client"} & set(loaded) == set()


def test_no_package_has_an_import_cycle_except_the_facade_and_its_router() -> None:
    """`ChatStream.router` imports `api` at its first use; `api` imports the facade."""
    script = SOURCE.parent / "scripts" / "import_graph.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=5) for line in printed.split("\n\n")[0].splitlines()[1:]]
    assert {"chatstream", "chatstream.scheduler", "chatstream.engines"} <= {row[0] for row in rows}
    assert [row for row in rows if row[4] != "0"] == [["chatstream", *rows[0][1:4], "1", "['api', 'chat_stream']"]]
