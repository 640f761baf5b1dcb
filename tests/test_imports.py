"""The source itself: a library that knows nothing of runs, no circle of imports, files and functions of some size."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in ("mutor", "baselines")
    for file in sorted((ROOT / folder).rglob("*.py"))
}


def inside(name, *packages):
    """Whether a module is one of these, or inside of one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imports(file):
    """The modules that a file imports: at its top, inside functions, or for types alone."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: a relative import"
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                yield name if name in FILES else node.module


def test_no_circle_among_modules():
    """Each module can be read after those that it imports, imports inside functions and for types included."""
    graph = {name: FILES.keys() & imports(file) for name, file in FILES.items()}
    assert sum(map(len, graph.values())) > 100
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


OWN = {"mutor.mtp", "mutor.checks", "mutor.streams"}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("mutor.mtp", {"torch", "transformers", "numpy", "safetensors", "peft", "mutor.registry", *OWN}),
        ("baselines", {"torch", "numpy", "safetensors", "peft", "baselines", *OWN}),
    ],
)
def test_the_library_knows_nothing_of_runs(package, allowed):
    """Nothing of configuration, tasks, training or results, not even for types. safetensors is a part of transformers'
    own requirements, peft that of LoRA; the library looks first whether it is there."""
    found = {(name, other) for name in FILES if inside(name, package) for other in imports(FILES[name])}
    assert len(found) > 20
    wrong = [pair for pair in sorted(found) if not inside(pair[1], *allowed, *sys.stdlib_module_names)]
    assert not wrong, "; ".join(f"{name} imports {other}" for name, other in wrong)


def test_files_and_functions_can_be_read():
    """At most 400 lines a file and 60 a function."""
    long = []
    for file in sorted(
        file for folder in ("mutor", "baselines", "benchmarks") for file in (ROOT / folder).rglob("*.py")
    ):
        name, text = file.relative_to(ROOT), file.read_text()
        lines = text.count("\n")
        long += [f"{name}: {lines} lines"] if lines > 400 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                long += [f"{name}: {node.name}: {lines} lines"] if lines > 60 else []
    assert not long, "; ".join(long)
