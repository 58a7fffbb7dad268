"""The import graph of a folder of Python modules: which imports which, circles, and arrows between its rooms.

An arrow is any import of another module of the folder: at the top of a module, in a function, for types alone, or by
``import_module`` of a name that is written out. The packages that Python runs on the way to a module are no arrows.
"""

import ast
import graphlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Graph = dict[str, set[str]]


def import_graph(folder: Path, package: str = "") -> Graph:
    """Return the modules of the folder, each with the modules of the folder that it imports.

    Args:
        folder: the root of the modules; links in it are followed.
        package: the name that the folder is imported by, empty where its modules are imported by their own names.

    """
    files = {}
    for directory, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(directory, name)
                parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
                files[".".join(part for part in parts if part not in ("", "__init__"))] = path
    return {
        module: {found for name in imported_names(path, module) if (found := _module(name, files))} - {module}
        for module, path in files.items()
    }


def imported_names(path: Path, module: str = "") -> set[str]:
    """Return the dotted names of all that a file imports; ``module`` is its own, for imports with leading dots."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in _names(node, package)}


def _names(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = [node.module] if node.module else []
        if node.level:
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] + base
        yield from (".".join([*base, alias.name]) for alias in node.names)
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
        yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _module(name: str, modules: Iterable[str]) -> str:
    """Return the module that a dotted name leads to, which may end in a name within it; empty if it is elsewhere."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, the first one again at the end; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def room_of(module: str, rooms: Iterable[str]) -> str:
    """Return the innermost room that a module stands in, empty if it is in none."""
    return _module(module, rooms)


def forbidden(graph: Graph, rooms: Mapping[str, set[str]]) -> list[str]:
    """Return the arrows that lead from a room where they may not, as "a imports b", and modules without a room.

    Args:
        graph: of :func:`import_graph`.
        rooms: the rooms, modules or packages by name, each with the rooms and the single modules that it may import. A
            package is a room without those parts of it that are rooms of their own.

    """
    wrong = []
    for module, imported in graph.items():
        room = room_of(module, rooms)
        if not room:
            wrong.append(f"{module} is in no room")
            continue
        wrong += [
            f"{module} imports {other}"
            for other in imported
            if other not in rooms[room] and room_of(other, rooms) not in {room, *rooms[room]}
        ]
    return sorted(wrong)
