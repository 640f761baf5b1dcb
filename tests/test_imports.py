"""The source itself: a library that knows nothing of runs, no circle of imports, files and functions of some size."""

import ast
import graphlib
import importlib
import re
import sys
from pathlib import Path

import pytest

import mutor
from mutor.registry import METHODS

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join((*package, *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for package, folder in (((), "mutor"), (("mutor",), "baselines"))
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
            # mypy knows baselines/ by its own name alone
            assert node.level <= (file.parent.name == "baselines"), f"{file}, line {node.lineno}: a relative import"
            home = f"mutor.baselines.{node.module}" if node.level else node.module
            for name in (f"{home}.{alias.name}" for alias in node.names):
                yield name if name in FILES else home


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
        ("mutor.baselines", {"torch", "numpy", "safetensors", "peft", "mutor.baselines", *OWN}),
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


def test_a_wheel_installs_one_package_with_all_that_it_needs(monkeypatch):
    """No top-level package but mutor, and in it baselines/, config/ and the report's page, file by file."""
    distribution = pytest.importorskip("setuptools.dist").Distribution
    monkeypatch.chdir(ROOT)
    wheel = distribution({"script_name": "none"})
    wheel.parse_config_files(["pyproject.toml"])
    build = wheel.get_command_obj("build_py")
    build.ensure_finalized()
    found = {f"{package}.{module}".replace(".", "/") + ".py" for package, module, _ in build.find_all_modules()}
    found |= {f"{package.replace('.', '/')}/{name}" for package, _, _, names in build.data_files for name in names}
    wanted = {str(file.relative_to(ROOT)) for file in ROOT.glob("mutor/**/*.py")}
    wanted |= {f"mutor/{file.relative_to(ROOT)}" for file in ROOT.glob("baselines/*.py")}
    config = [file for kind in ("yaml", "csv") for file in ROOT.glob(f"config/**/*.{kind}")]
    wanted |= {f"mutor/project/{file.relative_to(ROOT / 'config')}" for file in config}
    wanted |= {"mutor/py.typed", "mutor/results/report.html"}
    assert found == wanted and {"mutor/project/scales/own.yaml", "mutor/baselines/lora.py"} < found
    assert wheel.entry_points["console_scripts"] == ["mutor = mutor.cli:main"]
    authors = re.findall(r"^  - name: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert wheel.metadata.author == ", ".join(authors) and wheel.metadata.version == mutor.__version__


def test_methods_have_one_name():
    """Under another one their classes would be others than those that are registered."""
    with pytest.raises(ImportError, match=r"is mutor\.baselines"):
        importlib.import_module("baselines")
    assert all(target.startswith("mutor.") for target in METHODS.values())
