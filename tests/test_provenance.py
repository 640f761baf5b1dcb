"""When a record is stale: each kind of edit, on a copy of the project or on small modules."""

import ast
import importlib
import inspect
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mutor.cli import main
from mutor.config.load import load_scale
from mutor.config.runs import make_spec
from mutor.registry import METHODS, TASKS
from mutor.results import records
from mutor.results.provenance import NOT_IN_RESULTS, OLD, changed_code, code_hashes, run_code
from mutor.training.run import RunEnvironment, run

ROOT = Path(__file__).parent.parent
LAYOUT, LOSS, METHOD, MUTOR = (f"mutor/mtp/{name}.py" for name in ("layout", "loss", "method", "mutor"))


def record_of(method, task="star_graph", base=None, attention="auto"):
    """The part of a record, made by the code as it is, that says whether it is stale."""
    config = {"task": task, "method": method, "model": {"attention": attention}, "base": None}
    config["base"] = base and {**config, "method": base}
    return {"config": config, "code": run_code(ROOT, config)}


def copied(source, folder):
    """A copy of a project's code; what a process has read of one folder it does not read again."""
    for name in ("mutor", "baselines"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def project(tmp_path):
    """A copy of the project's code, to edit."""
    return copied(ROOT, tmp_path / "project")


def edit(project, file, old, new):
    """Replace a text of a file, which has to stand there, wherever it does."""
    text = (project / file).read_text()
    assert old in text, f"{file} has no {old!r}"
    (project / file).write_text(text.replace(old, new))


def cut(project, file, name):
    """Take a top-level definition out of a file; returns its text."""
    text = (project / file).read_text()
    node = next(n for n in ast.parse(text).body if getattr(n, "name", None) == name)
    lines = text.splitlines(keepends=True)
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    (project / file).write_text("".join(lines[:start] + lines[node.end_lineno :]))
    return "".join(lines[start : node.end_lineno])


# what changes no number

WORDS = [
    (LAYOUT, "import numpy as np\nimport torch\n", "import torch\nimport math\nimport numpy as np\n"),
    (LAYOUT, '    """Lay sequences into rows', '    """Put sequences into rows'),
    (LAYOUT, "IGNORE = -100", "# predicts nothing\nIGNORE = (-100)  # as torch has it"),
    (LAYOUT, "a sequence needs at least one prefix", "give one prefix"),
    (LAYOUT, "def regular(rows: TokenBatch, *, prefix_lm: bool = False) -> Layout:",
     "def regular(rows, *, prefix_lm: 'int' = False):"),
    (LAYOUT, "rows: list[list[int]] = [[]", "rows = [[]"),
    (METHOD, "    trunk: Backbone\n", "    trunk: Any\n    more: Backbone\n"),
    (METHOD, "    from mutor.mtp.backbone import Backbone\n", "    from mutor.mtp.backbone import EXTRA, Backbone\n"),
    ("mutor/config/recipe.py", 'doc="optimiser steps; 0: the model is scored as it starts", low=0)',
     'doc="steps", low=2)'),
    ("mutor/training/seed.py", "longer ones dropped", "are left out"),
    ("mutor/training/trainer.py", '"Recipe.for_size comes first"', '"sizes come first"'),
]  # fmt: skip


def test_words_imports_and_annotations_do_not_count(project):
    for file, old, new in WORDS:
        edit(project, file, old, new)
    for method in ("mutor", "next_token"):
        assert changed_code(record_of(method), project) == []


def test_a_name_counts_as_what_it_stands_for(project, tmp_path):
    edit(project, LAYOUT, "import numpy as np\n", "import numpy\nfrom numpy import full\n")
    edit(project, LAYOUT, "np.full(", "full(")
    edit(project, LAYOUT, "np.", "numpy.")
    imports = "from mutor.mtp.registers import anchors, placed, targets as aims\n"
    edit(project, MUTOR, "from mutor.mtp import registers as r\n", imports)
    for old, new in (("r.anchors(", "anchors("), ("r.placed(", "placed("), ("r.targets(", "aims(")):
        edit(project, MUTOR, old, new)
    assert changed_code(record_of("mutor"), project) == []
    other = copied(project, tmp_path / "other")
    edit(other, MUTOR, "targets as aims", "offsets as aims")
    assert changed_code(record_of("mutor"), other) == ["MuToR", "targets"]


def test_moving_a_definition_or_a_file_does_not_count(project, tmp_path):
    header = "import torch\nimport torch.nn.functional as F\nfrom torch.utils.checkpoint import checkpoint\n"
    header += "from mutor.mtp.loss import cross_entropy\n\n\n"
    (project / "mutor/mtp/heads.py").write_text(header + cut(project, LOSS, "head_loss"))
    for file in (METHOD, "baselines/bag_of_words.py"):
        edit(project, file, "from mutor.mtp.loss import head_loss", "from mutor.mtp.heads import head_loss")
    both = "from mutor.mtp.heads import head_loss\n        from mutor.mtp.loss import LossTargets"
    edit(project, "baselines/same_logits.py", "from mutor.mtp.loss import LossTargets, head_loss", both)
    moved = "from mutor.mtp.heads import head_loss\nfrom mutor.mtp.loss import LossTargets, cross_entropy\n"
    forced = "mutor/mtp/teacher_forcing.py"
    edit(project, forced, "from mutor.mtp.loss import LossTargets, cross_entropy, head_loss\n", moved)
    (project / LAYOUT).rename(project / "mutor/rows.py")
    for file in (*project.glob("mutor/**/*.py"), *project.glob("baselines/*.py")):
        text = file.read_text().replace("mutor.mtp.layout", "mutor.rows")
        for names in ("head_loss", "cross_entropy, head_loss"):
            text = text.replace(f"mutor.mtp.loss import {names}\n", f"mutor.mtp.heads import {names}\n")
        file.write_text(text)
    for method in METHODS:
        assert changed_code(record_of(method), project) == []
    other = copied(project, tmp_path / "other")
    edit(other, "mutor/mtp/heads.py", ".sum() / targets", ".mean() / targets")
    assert changed_code(record_of("next_token"), other) == ["head_loss"]


def test_a_baseline_does_not_depend_on_mutor(project):
    edit(project, MUTOR, "(self.config.d_max - self.config.d_min) // self.config.leap + 1", "7")
    edit(project, "mutor/mtp/registers.py", "d_min + leap * (u *", "d_min + 1 + leap * (u *")
    edit(project, "baselines/teacherless.py", "Config = TeacherlessConfig", "Config = TeacherlessConfig\n    more = 1")
    for method in ("next_token", "parallel_mtp", "sequential_mtp", "lora_next_token"):
        assert changed_code(record_of(method, "text"), project) == []
    assert changed_code(record_of("teacherless"), project) == ["Teacherless"]
    for method in ("mutor", "mutor_2d", "lora_mutor"):
        assert changed_code(record_of(method, "text"), project) == ["MuToR", "offsets"]
    started = record_of("next_token", base="mutor")  # from a model that MuToR trained
    assert changed_code(started, project) == ["MuToR", "offsets"]


def test_code_that_no_run_reaches_does_not_count(project):
    more = "\n\ndef unrelated(x):\n    return x + 1\n"
    shows = ("cli", "registry", "checks", "files", "config/load", "results/records", "results/report")
    for file in (LAYOUT, *(f"mutor/{name}.py" for name in shows)):
        effect = "" if file == LAYOUT else "\n\nunrelated(2)\n"
        (project / file).write_text((project / file).read_text() + more + effect)
    (project / "baselines/ranking.py").write_text("from mutor.mtp.method import Method\n" + more)
    for task in TASKS:
        assert changed_code(record_of("mutor", task), project) == []


# what may change numbers, and the names that are reported

CHANGES = [
    ("constant", "next_token", "star_graph", LAYOUT, "np.full(shape, -1,", "np.full(shape, -2,", ["lay"]),
    ("term", "mutor", "star_graph", METHOD, "return loss, {", "return loss + 1e-4, {", ["Method"]),
    ("operator", "next_token", "images", "mutor/training/trainer.py", "loss * processes()", "loss / processes()",
     ["MethodTrainer"]),
    ("argument's default", "mutor", "text", LAYOUT, "row_length: int | None = None", "row_length: int | None = 64",
     ["collate", "lay"]),
    ("setting's default", "mutor", "text", "mutor/config/recipe.py", "setting(0.02,", "setting(0.03,", ["Recipe"]),
    ("setting's default", "next_token", "text", "mutor/config/schema.py", "= setting(AUTO,", '= setting("eager",',
     ["ModelConfig"]),
    ("computed from settings", "next_token", "text", "mutor/config/recipe.py", "round(self.epochs * epoch)",
     "int(self.epochs * epoch)", ["Recipe"]),
    ("module's constant", "mutor", "star_graph", "mutor/models/build.py", 'RESIDUAL = ("o_proj", ', "RESIDUAL = (",
     ["RESIDUAL"]),
    ("module's table", "mutor", "text", "mutor/tasks/scoring.py", '"number": same_number', '"number": same_text',
     ["COMMAND", "COMPARE", "DIGITS", "OPERATOR", "number", "same_number"]),  # the others serve own data, too
    ("helper of a helper", "mutor", "star_graph", "mutor/tasks/graphs.py", "np.uint64(31)", "np.uint64(30)", ["_mix"]),
    ("adapters", "lora_next_token", "text", "mutor/mtp/adapters.py", 'bias="none"', 'bias="all"', ["inject"]),
    ("condition of an error", "mutor", "star_graph", LAYOUT, "if not 0 < example", "if not 1 < example", ["collate"]),
    ("kind of an error", "next_token", "star_graph", "mutor/mtp/backbone.py", "(RuntimeError, ValueError,",
     "(RuntimeError,", ["Backbone"]),
    ("field", "next_token", "star_graph", LAYOUT, "    prefix: int\n    sample: int = 0\n",
     "    sample: int = 0\n    prefix: int = 1\n", ["Example"]),
    ("texts", "next_token", "text", "mutor/tasks/standin_texts.py", "self.value > 60", "self.value > 50", ["_Story"]),
    ("texts", "next_token", "star_graph", "mutor/tasks/standin_texts.py", "self.value > 60", "self.value > 50", []),
    ("scoring", "next_token", "star_graph", "mutor/tasks/star_graph.py", "= np.all(right", "= np.any(right",
     ["StarGraph"]),
    ("on import", "next_token", "images", "mutor/models/llamagen.py", 'r("llamagen"', 'r("llama"', ["(on import)"]),
    ("on import", "next_token", "star_graph", "mutor/models/llamagen.py", 'r("llamagen"', 'r("llama"', []),
    ("new helper", "next_token", "star_graph", LAYOUT, "\n\ndef regular(",
     "\n\ndef shrunk(x):\n    return x\n\n\ndef regular(", []),
    ("new helper, called", "next_token", "star_graph", LAYOUT, "\n\ndef _packed(",
     "\n\nIGNORE = max(IGNORE, shrunk())\n\n\ndef shrunk():\n    return -50\n\n\ndef _packed(",
     ["IGNORE", "shrunk"]),
    ("mask", "mutor", "star_graph", "mutor/mtp/attention.py", "token & layout.prefix, least=False",
     "token, least=False", ["bounds"]),
    ("attention", "mutor", "star_graph", "mutor/mtp/blockwise.py", "torch.logaddexp(lse, score)",
     "torch.maximum(lse, score)", ["_Blockwise"]),
    ("kernel", "mutor", "star_graph", "mutor/mtp/kernels.py", "out, lse, 0.0, mask is None,",
     "out, lse, 0.0, True,", ["_cpu_backward"]),
    ("another backend's mask", "mutor", "star_graph", "mutor/mtp/attention.py", "<= high[b, q])) | (q == k)",
     "<= high[b, q]))", []),
    ("other name", "next_token", "star_graph", "mutor/tasks/graphs.py", "_shuffled_columns", "_columns",
     ["_columns", "_shuffled_columns", "generate"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "method", "task", "file", "old", "new", "names"), CHANGES, ids=lambda x: str(x)[:30])
def test_what_may_change_numbers_is_reported_by_name(project, kind, method, task, file, old, new, names):
    edit(project, file, old, new)
    assert changed_code(record_of(method, task), project) == names


# names, on small modules


def hashes(folder, text, **others):
    """The hashes of f in module mutor.a and of what it names, beside other modules in the package."""
    for name, content in {"a": text, **others}.items():
        file = folder / "mutor" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return dict(code_hashes(folder, "mutor.a:f"))


def test_a_local_name_hides_a_definition(tmp_path):
    text = """
    rows = 1
    def g(): return 2
    def h(): return 3
    def k(): return 4
    class C:
        def h(self): return g
    def f(rows, xs):
        h = [k for k in xs]
        return lambda g: (g, h, C)
    """
    found = hashes(tmp_path, inspect.cleandoc(text))
    assert set(found) == {"f", "C", "g"}  # g by C's method alone


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import mutor.c as c\ndef f(): return c.one.x", {"one"}),
        ("from mutor import c\ndef f(): return getattr(c, 'one')", {"one", "two"}),
        ("from .c import one as two\ndef f(): return two", {"one"}),
        ("from .p import y\ndef f(): return y", {"x"}),  # p has it from elsewhere, by another name
        ("from mutor import Lazy\ndef f(): return Lazy.x", {"Lazy", "__getattr__"}),
        ("def f():\n    from mutor.c import two\n    return [two() for one in range(3)]", {"two"}),
        ("from mutor.c import one\ndef f(x: one = 1) -> one: return x", set()),
        ("from mutor.c import one, two\n@one\ndef f(x=two()): return x", {"one", "two"}),
        ("from mutor.c import one, two\nclass f(one): y = two", {"one", "two"}),
        ("from mutor.c import two\nx, f = two, 1", {"two"}),
        ("from mutor.c import one, two\ndef f(): raise ValueError(one()) from two()", set()),
        ("from mutor.c import one\ndef f(): raise one(2)", {"one"}),
    ],
)
def test_what_a_definition_names(tmp_path, text, names):
    others = {
        "__init__": "def __getattr__(name):\n    from mutor.d import Lazy\n    return Lazy\n",
        "p/__init__": "from .b import x as y\n",
        "p/b": "x = 1\nz = 2\n",
        "c": "def one(): return 1\ndef two(): return 2\n",
        "d": "class Lazy: pass\nclass Other: pass\n",
    }
    assert set(hashes(tmp_path, text + "\n", **others)) == {"f", *names}


def test_two_definitions_of_one_name_are_told_apart(tmp_path):
    same = ["def same(): return 1\n", "def same(): return 2\n"]
    text = "from mutor.{} import same as x\nfrom mutor.{} import same as y\ndef g(): return x\ndef f(): return g(y)\n"
    one = hashes(tmp_path / "1", text.format("b", "c"), b=same[0], c=same[1])
    other = hashes(tmp_path / "2", text.format("c", "b"), b=same[0], c=same[1])
    assert one.keys() == other.keys() == {"f", "g", "same"}
    assert [name for name in one if one[name] != other[name]] == ["same"]
    assert hashes(tmp_path / "3", text.format("d", "c"), d=same[0], c=same[1]) == one  # moved


def test_lines_of_progress_count_for_what_they_call_alone(tmp_path):
    text = "def f(log, x):\n    {}\n    return x\n"
    same = ["log(f'{x} steps')", "print('steps', x, flush=True)", ""]
    others = ["x.append(log('steps'))", "log(x.pop())", "log((x := 2))", "print(x, file=x.file)"]
    found = [hashes(tmp_path / str(i), text.format(line))["f"] for i, line in enumerate([*same, *others])]
    assert len(set(found[:3])) == 1 and len(set(found[2:])) == 5


@pytest.mark.parametrize("field", ["y: int", "y: ClassVar[int] = 2", "y = 2", "y: int = 2", "y: float = 2"])
def test_annotations_count_where_they_make_fields(tmp_path, field):
    text = "from dataclasses import dataclass\nfrom typing import ClassVar\n{}class f:\n    x: int\n    {}\n"
    plain, made = (
        [
            hashes(tmp_path / f"{n}{kind[1:2]}", text.format(kind, line))["f"]
            for n, line in enumerate((field, "y: str = 2"))
        ]
        for kind in ("", "@dataclass\n")
    )
    assert (plain[0] == plain[1]) == (field != "y: int")
    assert (made[0] == made[1]) == (field in ("y: int = 2", "y: float = 2"))


def test_effects_of_imported_modules_count_whoever_imports_them(tmp_path):
    start, others = "from mutor.b import g\ndef f(): return 1\n", {"d": "def h(): return 1\n"}
    others["b"] = "import mutor.c\ndef g(): return 1\n"
    plain = hashes(tmp_path / "1", start, c="x = 1\n", **others)
    assert set(plain) == {"f", "x"}  # of what is imported without a name for it, everything counts
    patched = hashes(tmp_path / "2", start, c="x = 1\nfrom mutor import d\nd.h = print\n", **others)
    assert set(patched) == {"f", "x", "(on import)"}
    never = "x = 1\nif __name__ == '__main__':\n    print(2)\nfrom typing import TYPE_CHECKING\n"
    never += "if TYPE_CHECKING:\n    from mutor.d import h\n    print(h)\n"
    assert hashes(tmp_path / "3", start, c=never, **others) == plain


def test_what_stands_at_the_start_and_is_gone_is_reported(project):
    edit(project, "baselines/teacherless.py", "class Teacherless(", "class Other(")
    assert {"Teacherless", "TeacherlessConfig"} <= set(changed_code(record_of("teacherless"), project))


# whole runs


def short_spec(data, model, method):
    """A run of two steps from nothing."""
    scale = load_scale(ROOT, "smoke")
    spec = make_spec(scale, data, model, method, scale.datasets[data].settings.get(method, {}), (7,))
    changes = {"epochs": None, "steps": 2, "eval_every": 2, "save_every": 2, "log_every": 1}
    return replace(spec, base=None, recipe=replace(spec.recipe, **changes))


@pytest.mark.parametrize(
    ("data", "model", "method"), [("g2x3", "gpt2-2x32", "mutor"), ("gsm8k", "llama-2x32", "parallel_mtp")]
)
def test_all_that_a_run_executes_is_in_its_record(tmp_path, data, model, method):
    if data == "gsm8k":
        pytest.importorskip("lm_eval")
    for other in ("transformers.trainer", "transformers.models.gpt2.modeling_gpt2"):
        importlib.import_module(other)  # of other people, and watched it takes ten times as long
    spec, executed = short_spec(data, model, method), {}

    def look(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:  # a function's
            executed[code.co_qualname.partition(".")[0], code.co_filename] = None

    sys.setprofile(look)
    try:
        run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path))
    finally:
        sys.setprofile(None)
    code = records.read(records.seed_folder(tmp_path, spec, 7) / "metrics.json")["code"]
    files = [(name, Path(file).relative_to(ROOT)) for name, file in executed if Path(file).is_relative_to(ROOT)]
    ours = {
        (name, ".".join(file.with_suffix("").parts)) for name, file in files if file.parts[0] in ("mutor", "baselines")
    }
    assert {("MethodTrainer", "mutor.training.trainer"), ("Recipe", "mutor.config.recipe")} <= ours and len(ours) > 60
    left_out = tuple(f"{module}." for module in NOT_IN_RESULTS)
    assert not [at for at in ours if at[0] not in (*code, "<lambda>") and not f"{at[1]}.".startswith(left_out)]


def test_stale_runs_run_again_where_that_is_asked_for(tmp_path):
    spec = short_spec("g2x3", "gpt2-2x32", "next_token")
    folder = records.seed_folder(tmp_path, spec, 7)
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path))
    record = json.loads((folder / "metrics.json").read_text())
    assert changed_code(record, ROOT) == []
    record["code"]["MethodTrainer"] = "another"
    (folder / "metrics.json").write_text(json.dumps(record))
    for rerun_stale in (False, True):
        assert not (folder / "metrics.superseded-1.json").exists()
        run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path, rerun_stale=rerun_stale))
    assert json.loads((folder / "metrics.superseded-1.json").read_text()) == record
    assert changed_code(records.read(folder / "metrics.json"), ROOT) == []


def test_stale_lists_runs_with_the_definitions_that_changed(tmp_path, capsys):
    shown = {
        "version": 1, "scale": "smoke", "train_data": "d", "model": "m", "method": "mutor", "settings": {},
        "config_hash": "", "versions": {}, "curve": [], "steps": 1, "seconds_training": 1.0,
        "trainable_parameters": 1, "added_parameters": 0,
    }  # fmt: skip
    checkpoints = [{"names": ["best", "last"], "step": 1, "metrics": {}}]
    fresh = {**shown, "checkpoints": checkpoints, **record_of("mutor", base="next_token")}
    fresh["config"] |= {"settings": {}, "recipe": {}}
    cases = {
        1: {}, 2: {"code": {**fresh["code"], "collate": "0", "lost": "1"}}, 3: {"code": {"mutor.mtp.layout": "0"}},
        4: {"code": {}}, 5: {"config": {**fresh["config"], "method": "mutr"}},
    }  # fmt: skip
    for seed, changes in cases.items():
        file = tmp_path / f"smoke/d/m/mutor/default/seed{seed}/metrics.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({**fresh, "seed": seed, **changes}))
    assert main(["stale", "--scale", "smoke", "--runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"seed(\d)", line)[1] for line in lines[:-1]] == ["2", "3", "4", "5"]
    says = [line.split("metrics.json: ")[1] for line in lines[:-1]]
    assert says[:3] == ["collate, lost", OLD, OLD] and says[3].startswith(
        "method: 'mutr' is unknown, did you mean 'mutor'?"
    )
    assert lines[-1].startswith("4 stale runs at scale smoke")
