"""Top-level definitions of the project's modules: what each does, as a hash, and which others it names.

Read from the source, nothing is imported. A name counts as what it stands for, whatever it is called where it is used:

    import numpy as np                       np.mean(x)    numpy.mean(x)
    from mutor.mtp import registers as r     r.placed(x)   placed(x), which is named

What cannot change a number is left out: docstrings, comments, annotations, import lines, the words of built-in
errors, assertions and lines of progress, and all that `setting` says of a setting but its default.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNREAD = ("ctx", "kind", "type_comment", "type_params", "type_ignores", "simple", "returns")
NOT_RUN = ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'", "__name__ == 'baselines'")  # false
DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
PROGRESS = ("log", "print", "self.print_line")  # they show what they are given, and nobody reads what they return


@dataclass(frozen=True)
class Statement:
    """A top-level statement. names: (module, definition) that it uses, definition "" for a whole module."""

    digest: str
    names: frozenset[tuple[str, str]]
    imports: frozenset[str]  # what it imports when it runs, some of it modules


@dataclass(frozen=True)
class Module:
    """A module's top-level statements, by number."""

    name: str
    package: str
    statements: list[ast.stmt]
    definitions: dict[str, list[int]]  # name -> the statements that bind it
    imports: list[int]  # import lines
    effects: list[int]  # what does more on import than to bind a name
    bindings: dict[str, str]  # name -> what was imported under it


@functools.cache
def module(root: Path, name: str) -> Module | None:
    """A module of the project below `root`; None for others."""
    parts = name.split(".")
    if parts[0] != "mutor":  # where packages are installed others stand beside
        return None
    stem = root / Path(*parts)
    if parts[1:2] == ["baselines"] and not (root / "mutor/baselines").is_dir():  # a checkout
        stem = root / Path(*parts[1:])
    file, package = (
        (stem / "__init__.py", name) if stem.is_dir() else (stem.with_suffix(".py"), name.rpartition(".")[0])
    )
    if not file.is_file():
        return None
    tree = _Running().visit(ast.parse(file.read_text(encoding="utf-8")))
    bindings = {bound: target for bound, target in _bound(tree.body, package).items() if target is not None}
    found = Module(name, package, tree.body, {}, [], [], bindings)
    for number, node in enumerate(tree.body):
        bound = [name for name, target in _bound([node], package).items() if target is None]
        for each in bound:
            found.definitions.setdefault(each, []).append(number)
        words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.imports.append(number)
        elif not words and not (isinstance(node, DEFINES) and bound):
            found.effects.append(number)
    return found


@functools.cache
def statement(root: Path, name: str, number: int) -> Statement:
    """What a module's statement does, by its number."""
    home = module(root, name)
    assert home is not None
    meaning = _Meaning(root, home)
    node = meaning.visit(home.statements[number])
    digest = hashlib.sha256(_text(node).encode()).hexdigest()[:12]
    return Statement(digest, frozenset(meaning.names), frozenset(meaning.imports))


@functools.cache
def resolve(root: Path, dotted: str) -> tuple[str, str, tuple[str, ...]] | None:
    """(module, definition, attributes behind it) of a dotted name; definition "" for a module; None: not the project's.

    A name that a module imports from another is followed there. One that it has not is its `__getattr__`'s.
    """
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        home = module(root, ".".join(parts[:count]))
        if home is None:
            continue
        if count == len(parts):
            return home.name, "", ()
        name, rest = parts[count], parts[count + 1 :]
        if name in home.bindings and home.bindings[name] != f"{home.name}.{name}":
            return resolve(root, ".".join([home.bindings[name], *rest]))
        if name not in home.definitions and "__getattr__" in home.definitions:
            name = "__getattr__"
        return (home.name, name, tuple(rest)) if name in home.definitions else None
    return None


def _home(node: ast.ImportFrom, package: str) -> str:
    """The module that names are imported from."""
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])


def _bound(body: list[ast.stmt], package: str) -> dict[str, str | None]:
    """The names that statements bind in their own scope: what they import under them, None for all others."""
    names: dict[str, str | None] = {}
    elsewhere: set[str] = set()
    todo: list[ast.AST] = list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or target] = target
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{_home(node, package)}.{alias.name}" for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.setdefault(node.name, None)
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            todo += [n for n in ast.walk(node) if isinstance(n, ast.NamedExpr)]
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            elsewhere |= set(node.names)
        elif not isinstance(node, ast.Lambda):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                names.setdefault(node.id, None)
            elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
                names.setdefault(node.name, None)
            elif isinstance(node, ast.MatchMapping) and node.rest:
                names.setdefault(node.rest, None)
            todo += ast.iter_child_nodes(node)
    return {name: target for name, target in names.items() if name not in elsewhere}


class _Running(ast.NodeTransformer):
    """Drops what is not run on import: branches for type checkers and for a module run as a script."""

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test) in NOT_RUN else node


@dataclass(frozen=True)
class _Scope:
    names: dict[str, str | None]
    of_class: bool = False
    has_fields: bool = False  # a class whose annotated names are fields, as a dataclass's


class _Meaning(ast.NodeTransformer):
    """Rewrites a top-level statement to what it does, and collects the definitions that it names."""

    def __init__(self, root: Path, home: Module):
        self.root, self.home, self.scopes = root, home, list[_Scope]()
        self.names: set[tuple[str, str]] = set()
        self.imports: set[str] = set()

    @contextmanager
    def _inside(self, scope: _Scope) -> Iterator[None]:
        self.scopes.append(scope)
        yield
        self.scopes.pop()

    # names

    def _target(self, name: str) -> str | None:
        """The dotted name that a name stands for; None for a variable or what Python has built in."""
        for scope in reversed(self.scopes):
            if name in scope.names and (scope is self.scopes[-1] or not scope.of_class):
                return scope.names[name]
        if name in self.home.bindings:
            return self.home.bindings[name]
        return f"{self.home.name}.{name}" if name in self.home.definitions else None

    def _dotted(self, node: ast.AST) -> str | None:
        """The dotted name that a name, or a chain of attributes behind one, stands for."""
        if isinstance(node, ast.Name):
            return self._target(node.id)
        before = self._dotted(node.value) if isinstance(node, ast.Attribute) else None
        return f"{before}.{node.attr}" if before and isinstance(node, ast.Attribute) else None

    def visit_Name(self, node: ast.Name | ast.Attribute) -> Any:
        dotted = self._dotted(node)
        if dotted is None:
            return self.generic_visit(node)
        found = resolve(self.root, dotted)
        if found is not None:
            home, name, rest = found
            if not isinstance(node.ctx, ast.Store):
                self.names.add((home, name))
            dotted = ".".join([name or home.rpartition(".")[2], *rest])
        return ast.Name(dotted, node.ctx)

    visit_Attribute = visit_Name

    # scopes

    def _function(self, node: Any) -> Any:
        node.decorator_list = [self.visit(d) for d in node.decorator_list]
        node.args = self.visit(node.args)
        with self._inside(_Scope(_arguments(node.args) | _bound(node.body, self.home.package))):
            node.body = self._visited(node.body)
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        node.args = self.visit(node.args)
        with self._inside(_Scope(_arguments(node.args))):
            node.body = self.visit(node.body)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        for part in ("decorator_list", "bases", "keywords"):
            setattr(node, part, [self.visit(n) for n in getattr(node, part)])
        fields = bool(node.decorator_list) or any(ast.unparse(b).endswith("NamedTuple") for b in node.bases)
        with self._inside(_Scope(_bound(node.body, self.home.package), of_class=True, has_fields=fields)):
            node.body = self._visited(node.body)
        return node

    def _comprehension(self, node: Any) -> Any:
        first = node.generators[0]
        first.iter = self.visit(first.iter)  # the only part that is outside
        stored = [n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)]
        with self._inside(_Scope(dict.fromkeys(stored))):
            return self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _visited(self, body: list[ast.stmt]) -> list[ast.stmt]:
        return self.generic_visit(ast.Module(body, [])).body  # type: ignore[attr-defined]

    # what is left out

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imports.add(alias.name)
            if alias.asname is None and module(self.root, alias.name):  # for its effects
                self.names.add((alias.name, ""))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        home = _home(node, self.home.package)
        self.imports |= {home, *(f"{home}.{alias.name}" for alias in node.names)}

    def visit_Pass(self, node: ast.Pass) -> None:
        return None

    def visit_arg(self, node: ast.arg) -> Any:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.target = self.visit(node.target)
        node.value = node.value and self.visit(node.value)
        if self.scopes and self.scopes[-1].has_fields:
            text = ast.unparse(node.annotation)
            kind = next((kind for kind in ("ClassVar", "InitVar", "KW_ONLY") if kind in text), "field")
            return ast.AnnAssign(node.target, ast.Constant(kind), node.value, node.simple)
        return node.value and ast.Assign([node.target], node.value)

    def visit_Raise(self, node: ast.Raise) -> Any:
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        if isinstance(error, ast.Name) and self._target(error.id) is None and hasattr(builtins, error.id):
            return ast.Raise(error)
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> Any:
        return ast.Assert(self.visit(node.test))

    def visit_Expr(self, node: ast.Expr) -> Any:
        value = node.value
        if isinstance(value, ast.Constant):
            return None
        if not isinstance(value, ast.Call) or ast.unparse(value.func) not in PROGRESS or self._dotted(value.func):
            return self.generic_visit(node)
        if any(keyword.arg not in ("end", "flush", "sep") for keyword in value.keywords):
            return self.generic_visit(node)  # into a file
        calls = [self.visit(call) for argument in value.args for call in _calls(argument)]
        return ast.Expr(ast.Call(value.func, calls, [])) if calls else None  # a call may do more than show

    def visit_Call(self, node: ast.Call) -> Any:
        dotted = self._dotted(node.func)
        found = dotted and resolve(self.root, dotted)
        if found and found[1:] == ("setting", ()):
            node.keywords = [k for k in node.keywords if k.arg == "default"]
        return self.generic_visit(node)


def _arguments(node: ast.arguments) -> dict[str, str | None]:
    named = (*node.posonlyargs, *node.args, *node.kwonlyargs, node.vararg, node.kwarg)
    return dict.fromkeys(argument.arg for argument in named if argument)


def _calls(node: ast.AST) -> list[ast.AST]:
    """The outermost parts of an expression that may do more than give a value."""
    if isinstance(node, (ast.Call, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)):
        return [node]
    return [call for child in ast.iter_child_nodes(node) for call in _calls(child)]


def _text(value: Any) -> str:
    """A syntax tree as a text that is the same for all versions of Python."""
    if isinstance(value, ast.AST):
        kept = ((k, v) for k, v in ast.iter_fields(value) if k not in UNREAD and v is not None and v != [])
        return f"{type(value).__name__}({', '.join(f'{k}={_text(v)}' for k, v in kept)})"
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else repr(value)
