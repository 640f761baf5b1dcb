"""Mutation run: small changes of the code, one at a time, each of which a test should notice (`make mutants`).

mutmut makes and tries them; pyproject.toml says in which files and by which tests. Added here: functions under
`torch.no_grad()` are changed too (mutmut leaves out all with a decorator), arguments that change no value on a CPU are
not, and what survived is printed as changed lines. Fails below 95% killed. A second run tries what changed since;
delete mutants/ to begin anew.
"""

import sys

import libcst as cst
from mutmut.__main__ import _run
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files

WANTED = 0.95
NO_GRAD = cst.parse_expression("torch.no_grad()")
UNSEEN = ("device", "strict", "use_cache")  # arguments by name: where, whether lengths are checked, how fast
leaves_out = MutationVisitor._skip_node_and_children
removes_ignored = MutationVisitor._removes_ignored_code


def unseen(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value in UNSEEN


def changes_unseen(visitor: MutationVisitor, node: cst.CSTNode, mutated: cst.CSTNode) -> bool:
    """Whether a call was changed in nothing but an unseen argument."""
    if isinstance(node, cst.Call) and isinstance(mutated, cst.Call) and any(map(unseen, node.args)):
        before, after = ([arg.value for arg in call.args if not unseen(arg)] for call in (node, mutated))
        same = len(before) == len(after) and all(one.deep_equals(two) for one, two in zip(before, after, strict=True))
        if same and node.func.deep_equals(mutated.func):
            return True
    return bool(removes_ignored(visitor, node, mutated))


def leaves_out_less(visitor: MutationVisitor, node: cst.CSTNode) -> bool:
    if unseen(node):
        return True
    decorators = node.decorators if isinstance(node, cst.FunctionDef) else ()
    if [each.decorator.deep_equals(NO_GRAD) for each in decorators] == [True]:
        return False
    return leaves_out(visitor, node)


def report() -> float:
    """Print what survived, file by file; the share that was killed."""
    total = killed = 0
    for path in walk_mutatable_files():
        found = SourceFileMutationData(path=path)
        found.load()
        for name, code in found.exit_code_by_key.items():
            status = status_by_exit_code[code]
            total, killed = total + 1, killed + (status in ("killed", "timeout"))
            if status not in ("killed", "timeout"):
                lines = get_diff_for_mutant(name, path=path).splitlines()
                changed = [line for line in lines[2:] if line.startswith(("-", "+"))]
                print(f"\n{name}: {status}", *changed, sep="\n")
    print(f"\n{killed} of {total} killed: {killed / total:.1%}, wanted: {WANTED:.0%}")
    return killed / total


if __name__ == "__main__":
    MutationVisitor._skip_node_and_children = leaves_out_less
    MutationVisitor._removes_ignored_code = changes_unseen
    if sys.argv[1:] != ["--report"]:
        _run(sys.argv[1:], None)
    sys.exit(report() < WANTED)
