#!/usr/bin/env python3
"""Print the import graph of each package under src/, and the longest functions and files.

    scripts/import_graph.py              this tree
    scripts/import_graph.py ../other     another one, for example an older commit

A room is a module or package directly inside the package of its row. An arrow is an import from one room to another,
also inside a function, but not under `if TYPE_CHECKING`. Floors: length of the longest chain of arrows. A circle is a
set of rooms that import each other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

NUM_FUNCTIONS, NUM_FILES = 10, 3

Graph = dict[str, set[str]]


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)
    source = root / "src"
    files = {module_name(source, file): file for file in sorted(source.rglob("*.py"))}
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    imports = {name: {*imported_modules(tree, trees.keys())} for name, tree in trees.items()}
    print(f"{'package':36} rooms floors arrows circles")
    for package in [name for name, file in files.items() if file.name == "__init__.py"]:
        graph = room_graph(package, imports)
        if len(graph) > 1:
            arrows = sum(map(len, graph.values()))
            circles = [sorted(rooms) for rooms in components(graph) if len(rooms) > 1]
            print(f"{package:36} {len(graph):5} {num_floors(graph):6} {arrows:6} {len(circles):7}", *circles)
    print(f"\nThe {NUM_FUNCTIONS} longest functions, in lines")
    functions = [
        (size, files[name].relative_to(root), what) for name, tree in trees.items() for size, what in sizes(tree)
    ]
    for size, file, what in sorted(functions, reverse=True)[:NUM_FUNCTIONS]:
        print(f"{size:5} {file} {what}")
    print(f"\nThe {NUM_FILES} longest files, in lines")
    lengths = [(len(file.read_text(encoding="utf-8").splitlines()), file) for file in files.values()]
    for length, file in sorted(lengths, reverse=True)[:NUM_FILES]:
        print(f"{length:5} {file.relative_to(root)}")


def module_name(source: Path, file: Path) -> str:
    return ".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(tree: ast.Module, modules: object) -> Iterator[str]:
    """Modules of this project that a file imports while the program runs."""
    for_types = {id(inner) for outer in ast.walk(tree) if is_type_checking(outer) for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        if id(node) in for_types or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in names]  # type: ignore[operator]
        yield from (name for name in names if name in modules)  # type: ignore[operator]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def room_graph(package: str, imports: dict[str, set[str]]) -> Graph:
    """The rooms of a package, and the rooms that each one imports. The package's own `__init__` is not a room."""

    def room_of(module: str) -> str | None:
        inside = module.removeprefix(f"{package}.")
        return inside.partition(".")[0] if inside != module else None

    graph: Graph = {room: set() for module in imports if (room := room_of(module)) is not None}
    for module, imported in imports.items():
        room = room_of(module)
        if room is not None:
            graph[room] |= {other for name in imported if (other := room_of(name)) not in (None, room)}
    return graph


def components(graph: Graph) -> list[frozenset[str]]:
    """The strongly connected components: rooms that reach each other, and single rooms."""
    reach = {room: reachable(graph, room) for room in graph}
    return [*{frozenset(other for other in reach[room] if room in reach[other]) | {room} for room in graph}]


def reachable(graph: Graph, room: str) -> set[str]:
    found, todo = set[str](), [room]
    while todo:
        for other in graph[todo.pop()] - found:
            found.add(other)
            todo.append(other)
    return found


def num_floors(graph: Graph) -> int:
    """The length of the longest chain of imports. Rooms of one cycle count as one."""
    component_of = {room: rooms for rooms in components(graph) for room in rooms}
    between = {
        rooms: {component_of[other] for room in rooms for other in graph[room]} - {rooms}
        for rooms in component_of.values()
    }
    floors: dict[frozenset[str], int] = {}
    for rooms in TopologicalSorter(between).static_order():
        floors[rooms] = 1 + max((floors[below] for below in between[rooms]), default=0)
    return max(floors.values(), default=0)


def sizes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, node.name


if __name__ == "__main__":
    main()
