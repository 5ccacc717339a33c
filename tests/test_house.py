"""The rules of the house, read from the source: where things live, and which way imports run."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import foveate
from foveate.families import FAMILIES, REFUSED, TOWERS

ROOT = Path(foveate.__file__).parent
BENCHMARKS = ROOT.parent / "benchmarks"
LAYERS = (  # a file imports from its own layer and those below; a room that is not listed fails
    "_moved families fingerprint jsonl places precision tokens cuts heads images errors notebook",
    "methods report video films frames",
    "engine viz analysis",
    "api pictures",
    "loading chat answering pocket",
    "serving evaluation tuning training lab measuring",
    "app",
    "cli __main__",
)
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms.split()}
SHARED = {
    "base",
    "registry",
    "compose",
    "fields",
    "saved",
    "budgets",
    "pixels",
    "baselines",
    "trained",
    "tunable",
    "weights",
    "tools",
    "networks",
}  # of methods: what is no method of one paper
OF_ONE_METHOD = {  # files about one method, which say so
    "foveate.tuning.search": "the searches of two papers, which make plans for their methods",
    "foveate.lab.evaluate": "a study of the outliers that PruMerge finds",
}


def source(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("foveate", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def for_types(tree: ast.Module) -> set[int]:
    """Nodes that only type checkers see."""
    guarded = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    return {id(inner) for node in guarded for statement in node.body for inner in ast.walk(statement)}


@cache
def imports(name: str) -> tuple[tuple[str, str], ...]:
    """Of the package's own modules: (module, name in it), wherever in the file they are imported."""
    tree = source(name)
    hidden = for_types(tree)
    return tuple(pair for node in ast.walk(tree) if id(node) not in hidden for pair in _targets(node, name))


def _targets(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "foveate")
    if isinstance(node, ast.ImportFrom):
        package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
        above = package[: len(package) + 1 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names if base.partition(".")[0] == "foveate" else ():
            inside = f"{base}.{alias.name}"
            yield (inside, "") if inside in MODULES else (base, alias.name)


def room(name: str) -> str:
    return name.split(".")[1]


INSIDE = [name for name in MODULES if name != "foveate"]


def test_every_room_has_its_layer():
    assert {room(name) for name in INSIDE} == set(HEIGHT)


def test_imports_run_down():
    pairs = {(name, target) for name in INSIDE for target, _ in imports(name) if target != "foveate"}
    assert len(pairs) > 500
    assert [f"{name} imports {target}" for name, target in sorted(pairs) if HEIGHT[room(target)] > HEIGHT[room(name)]] == []


def test_what_methods_ask_of_the_front_door():
    """``with method(model)`` needs the engine, which is above: it is the only such place."""
    above = {name for name in INSIDE if ("foveate", "") in imports(name)}
    assert above == {"foveate.methods.base"}
    asked = {n for _, n in (pair for name in INSIDE for pair in imports(name) if pair[0] == "foveate")} - {""}
    assert asked == {"__version__"}


def test_the_playground_knows_nothing_of_the_engine():
    """It shows answers, pictures and scenes; of the lab it takes the scenes alone."""
    taken = {target for name in INSIDE if room(name) == "app" for target, _ in imports(name)}
    rooms = {room(target) for target in taken}
    assert {"answering", "viz"} <= rooms
    assert not rooms & {"engine", "serving", "evaluation", "tuning", "training", "api", "pictures"}
    assert {target for target in taken if room(target) == "lab"} == {"foveate.lab.examples"}


def test_no_circles():
    """Neither of files nor of rooms."""
    files = {name: {target for target, _ in imports(name) if target not in ("foveate", name)} for name in INSIDE}
    rooms: dict[str, set[str]] = {}
    for name, targets in files.items():
        rooms.setdefault(room(name), set()).update(room(target) for target in targets if room(target) != room(name))
    assert circle(files) == []
    assert circle(rooms) == []


def circle(graph: dict[str, set[str]]) -> list[str]:
    """What is left when all are taken away from which nothing leads on."""
    left = {node: set(targets) for node, targets in graph.items()}
    while done := [node for node, targets in left.items() if not targets & left.keys()]:
        for node in done:
            del left[node]
    return sorted(left)


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_methods_are_known_in_their_files_only():
    """No file decides by the name of a method, nor takes its class."""
    known = {info.name.partition(":")[0] for info in foveate.methods()}
    outside = [name for name in INSIDE if room(name) != "methods"]
    assert {name: known & compared(source(name)) for name in outside if known & compared(source(name))} == {}
    for name in set(outside) - set(OF_ONE_METHOD):
        taken = {target.split(".")[2] for target, _ in imports(name) if target.startswith("foveate.methods.")}
        assert taken <= SHARED, name


def test_families_are_known_in_one_table():
    kinds = {*FAMILIES, *TOWERS, *REFUSED}
    for name in set(INSIDE) - {"foveate.families"}:
        written = {node.value for node in ast.walk(source(name)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not kinds & written, name


def test_progress_is_shown_in_two_ways():
    """By the console of the commands and the bar of studies: on stderr, and in terminals only."""
    assert {name for name in INSIDE if "rich.progress" in MODULES[name].read_text(encoding="utf-8")} == {
        "foveate.cli.common",
        "foveate.lab.progress",
    }


def compared(tree: ast.Module) -> set[str]:
    """Strings that something is decided by."""
    deciding: list[ast.AST] = [node for node in ast.walk(tree) if isinstance(node, ast.Compare | ast.MatchValue)]
    deciding += [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("startswith", "endswith")
    ]
    inside = (inner for node in deciding for inner in ast.walk(node))
    return {inner.value for inner in inside if isinstance(inner, ast.Constant) and isinstance(inner.value, str)}


def test_decisions_are_found():
    tree = ast.parse("x = name == 'iti' or name in ('tome', 'ats') or name.startswith('aim')\ny = {'evit': 1}")
    assert compared(tree) == {"iti", "tome", "ats", "aim"}


def test_files_are_short():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*MODULES.values(), *BENCHMARKS.glob("*.py")]}
    assert {str(path): count for path, count in lines.items() if count > 400} == {}


def test_tests_mirror_the_folders():
    """A folder of tests is a folder of what they test."""
    tests = Path(__file__).parent
    for folder in (path for path in tests.rglob("*") if path.is_dir() and any(path.glob("test_*.py"))):
        mirrored = folder.relative_to(tests)
        assert str(mirrored) in ("vllm", "benchmarks") or (ROOT / mirrored).is_dir(), f"{mirrored} mirrors nothing"


# -- the table of public names


def test_names_of_the_front_door_agree():
    """The lookup table, ``__all__``, and what type checkers read."""
    tree = source("foveate")
    typed = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) in for_types(tree):
            for alias in node.names:
                assert alias.asname in (None, alias.name)
                typed[alias.name] = node.module
    assert typed == foveate._HOME
    assert sorted(typed) == sorted(set(foveate.__all__))
    assert len(foveate.__all__) == len(set(foveate.__all__))


def test_public_names_are_there():
    assert [name for name in foveate.__all__ if not getattr(foveate, name).__doc__] == []


def test_rooms_are_found_without_an_import():
    for name in {room(name) for name in INSIDE} - {"__main__"}:
        assert foveate.__getattr__(name).__name__ == f"foveate.{name}"
    with pytest.raises(AttributeError, match="no attribute 'cellar'"):
        _ = foveate.cellar
