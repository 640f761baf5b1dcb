"""Mutation run: small changes of the code, one at a time, each of which a test should notice (`make mutants`).

mutmut makes and tries them; pyproject.toml says in which files and by which tests. Added here: functions under
`torch.no_grad()` are changed too (mutmut leaves out all with a decorator), arguments that change no value on a CPU are
not, and what survived is printed as changed lines. One in eight is tried, chosen by its name, which tells the share
that is killed to a percent or two; `--all` tries them all, in some six hours of one core. Fails below 95% killed. A
second run tries what changed since; `--report` prints what the last one found; delete mutants/ to begin anew.
"""

import argparse
import fnmatch
import sys
import zlib
from collections.abc import Sequence

import libcst as cst
import mutmut.__main__ as tool
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from scipy.stats import binomtest

WANTED = 0.95
ONE_IN = 8
NOTICED = ("killed", "timeout", "segfault", "suspicious")  # the last ones end the whole process
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


def chosen(name: str, one_in: int, names: Sequence[str] = ()) -> bool:
    """Whether a mutant is one of the sample, or named; none of those that only a GPU runs."""
    wanted = any(fnmatch.fnmatch(name, each) for each in names) if names else zlib.crc32(name.encode()) % one_in == 0
    return wanted and "__cuda_" not in name


def report(one_in: int, names: Sequence[str] = ()) -> float:
    """Print what survived, file by file; the share that was killed."""
    total = killed = 0
    for path in walk_mutatable_files():
        found = SourceFileMutationData(path=path)
        found.load()
        for name, code in found.exit_code_by_key.items():
            if code is None or not chosen(name, one_in, names):  # None: not tried yet
                continue
            status = status_by_exit_code[code]
            total, killed = total + 1, killed + (status in NOTICED)
            if status not in NOTICED:
                lines = get_diff_for_mutant(name, path=path).splitlines()
                changed = [line for line in lines[2:] if line.startswith(("-", "+"))]
                print(f"\n{name}: {status}", *changed, sep="\n")
    if not total:
        print(f"no mutant was tried{f' of {names}' if names else ''}")
        return 0.0
    low, high = binomtest(killed, total).proportion_ci(method="wilson")
    every = f"one in {one_in}, so of all {low:.1%} to {high:.1%}" if one_in > 1 else "all"
    print(f"\n{killed} of {total} killed: {killed / total:.1%} ({every}); wanted: {WANTED:.0%}")
    return killed / total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutants to try again; * stands for anything")
    parser.add_argument("--all", action="store_true", help="try all")
    parser.add_argument("--report", action="store_true", help="try none")
    args = parser.parse_args()
    one_in = 1 if args.all or args.names else ONE_IN
    collected = tool.collect_source_file_mutation_data

    def sample(**options):
        mutants, of_files = collected(**options)
        return [each for each in mutants if chosen(each[1], one_in)], of_files

    MutationVisitor._skip_node_and_children = leaves_out_less
    MutationVisitor._removes_ignored_code = changes_unseen
    tool.collect_source_file_mutation_data = sample
    if not args.report:
        tool._run(args.names, None)
    return report(one_in, args.names) < WANTED


if __name__ == "__main__":
    sys.exit(main())
