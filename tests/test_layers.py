"""Imports point one way: cli to nn, nn and integrations to ops, ops to kernels; so do those of the benchmarks."""

from pathlib import Path

import pytest
from import_graph import circle, forbidden, import_graph, imported_names, room_of

REPOSITORY = Path(__file__).parents[1]
PACKAGE = import_graph(REPOSITORY / "fastwkv", "fastwkv")
# Each room, with the rooms and the single modules that its modules may import.
ROOMS = {
    "fastwkv.reference": set(),
    "fastwkv.kernels": set(),
    "fastwkv.kernels.cpu": {"fastwkv.kernels.config", "fastwkv.kernels.launch", "fastwkv.kernels.notation"},
    "fastwkv.ops": {"fastwkv.kernels.launch", "fastwkv.reference.wkv"},  # the latter for WKVState
    "fastwkv.nn": {"fastwkv.ops", "fastwkv.reference.wkv"},
    "fastwkv.integrations": {"fastwkv.ops", "fastwkv.nn", "fastwkv.reference.wkv"},
    "fastwkv._startup": set(),
    "fastwkv": {"fastwkv._startup", "fastwkv.nn", "fastwkv.ops", "fastwkv.reference"},
    "fastwkv.cli": {"fastwkv", "fastwkv._startup", "fastwkv.nn"},
    "fastwkv.__main__": {"fastwkv.cli"},
}
BENCH = import_graph(REPOSITORY / "bench")
# The rooms of the benchmarks, from the lowest; programs stand above them and do not know each other.
BENCH_ROOMS = {
    "common": set(),
    "timing": {"common"},
    "machine_code": {"common"},
    "precompiled": {"machine_code"},
    "correctness": {"common", "precompiled"},
    "peers": set(),
    "throughput": {"common", "timing", "peers"},
    "generation": {"common", "timing"},
    "layer": {"common", "timing", "peers"},
    "papers": {"common"},
    "launch_shapes": {"common", "timing"},
}
PROGRAMS = {path.stem for path in (REPOSITORY / "bench").glob("*.py")}
BENCH_ROOMS |= {program: set(BENCH_ROOMS) for program in PROGRAMS}
# A few minutes on a GPU: parts of other programs, which gpu.py runs.
BENCH_ROOMS |= {"gpu_minutes": {*BENCH_ROOMS["ops"], "ops", "gen_time"}, "gpu": {"gpu_minutes"}}


@pytest.mark.parametrize(("graph", "rooms"), [(PACKAGE, ROOMS), (BENCH, BENCH_ROOMS)], ids=["fastwkv", "bench"])
def test_imports_point_one_way_and_rooms_are_in_order(graph, rooms):
    assert forbidden(graph, rooms) == []
    assert circle(graph) == []
    assert circle({room: {room_of(name, rooms) for name in allowed} - {room} for room, allowed in rooms.items()}) == []
    assert {room_of(module, rooms) for module in graph} == set(rooms)


def test_every_module_was_read():
    folders = (REPOSITORY / "fastwkv", REPOSITORY / "kernels", REPOSITORY / "reference")
    assert len(PACKAGE) == sum(len({p.resolve() for p in folder.rglob("*.py")}) for folder in folders)


def test_triton_is_imported_by_gpu_kernels_only():
    files = [path for name in ("fastwkv", "kernels", "reference") for path in (REPOSITORY / name).rglob("*.py")]
    users = {path.parent for path in files if any(n.split(".")[0] == "triton" for n in imported_names(path))}
    assert users == {REPOSITORY / "kernels"}


def test_reference_imports_torch_alone():
    for path in (REPOSITORY / "reference").glob("*.py"):
        names = imported_names(path, f"fastwkv.reference.{path.stem}")
        # Of the package it imports itself alone, as its room says.
        assert {name.split(".")[0] for name in names} <= {"torch", "typing", "collections", "fastwkv"}, path.name


@pytest.fixture
def tree(tmp_path):
    """A folder of modules in which everything is as it should be: b.y imports a.x, a.x imports nothing."""
    for name, text in {"a/x.py": "import os", "b/y.py": "from p.a.x import thing", "b/z.py": "import p.b.y"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


ROOMS_OF_TREE = {"p.a": set(), "p.b": {"p.a"}}


def test_a_tree_in_order_has_neither_circles_nor_forbidden_arrows(tree):
    graph = import_graph(tree, "p")
    assert graph == {"p.a.x": set(), "p.b.y": {"p.a.x"}, "p.b.z": {"p.b.y"}}
    assert circle(graph) == []
    assert forbidden(graph, ROOMS_OF_TREE) == []


@pytest.mark.parametrize(
    "text",
    [
        "import p.b.z",
        "from p.b import z",
        "from p.b.z import thing",
        "from ..b import z",
        "from ..b.z import thing",
        "def f():\n    from p.b import z",
        "if TYPE_CHECKING:\n    from p.b.z import thing",
        "from importlib import import_module\nimport_module('p.b.z')",
        "import importlib\nimportlib.import_module('p.b.z')",
    ],
)
def test_a_circle_is_found_however_it_is_written(tree, text):
    (tree / "a/x.py").write_text(text)
    graph = import_graph(tree, "p")
    assert set(circle(graph)) == {"p.a.x", "p.b.y", "p.b.z"}
    assert forbidden(graph, ROOMS_OF_TREE) == ["p.a.x imports p.b.z"]


def test_a_circle_through_a_package_is_found(tree):
    (tree / "b/__init__.py").write_text("from p.b.y import thing")
    assert circle(import_graph(tree, "p")) == []
    (tree / "b/y.py").write_text("from p.b import other")
    assert set(circle(import_graph(tree, "p"))) == {"p.b", "p.b.y"}


def test_modules_without_a_package_know_each_other_by_their_own_names(tree):
    (tree / "top.py").write_text("from a.x import thing\nimport b.y")
    graph = import_graph(tree)
    assert graph["top"] == {"a.x", "b.y"}
    assert forbidden(graph, {"a": set(), "b": set(), "top": {"a", "b.y"}}) == []
    assert forbidden(graph, {"a": set(), "b": set(), "top": {"b"}}) == ["top imports a.x"]


def test_a_module_in_no_room_is_named(tree):
    assert forbidden(import_graph(tree, "p"), {"p.a": set()}) == ["p.b.y is in no room", "p.b.z is in no room"]


def test_a_linked_folder_is_part_of_the_tree(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "w.py").write_text("import p.b.z")
    (tree / "c").symlink_to(elsewhere)
    assert import_graph(tree, "p")["p.c.w"] == {"p.b.z"}
